"""How layers with exact attention hold their scores: `model.attention`."""

import flax.linen as nn
import jax

KERNELS = {"auto": None, "dense": "dense", "blocks": "blocks"}


def check_attention(name: str) -> None:
  """Raises ValueError, naming the config key, if there is no such choice."""
  if name not in KERNELS:
    raise ValueError(f"model.attention is {name!r}; one of {', '.join(KERNELS)}")


def kernel_for(name: str, tokens: int) -> str | None:
  """The kernel of `blockwise_attention` for the queries of so many tokens.

  Blocks are cut out of all queries one after the other. Where these lie on several
  devices, every device would get all of them: unasked, scores are held whole there.
  """
  if name == "auto" and devices_of_tokens(tokens):
    return "dense"
  return KERNELS[name]


def devices_of_tokens(tokens: int) -> str | None:
  """The axis of the mesh, if any, whose several devices hold equal parts of a call.

  The mesh is that of `jax.set_mesh`, its axis the one of the logical axis "length".
  """
  axes = nn.logical_to_mesh_axes(("length",))
  sizes = jax.sharding.get_abstract_mesh().shape
  axis = axes[0] if axes else None
  size = sizes.get(axis, 1) if isinstance(axis, str) else 1
  return axis if size > 1 and tokens % size == 0 else None
