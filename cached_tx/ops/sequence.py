"""FAVOR+ over a sequence that lies on several devices.

Every device adds up its own keys, the sums go round once, and each device then attends
to its own tokens, starting from the sums of all devices before it. Only these sums
cross: one gather forward and one scatter of their cotangents backward, of R x (K + 1)
+ 2 numbers per row, head and device, however long the sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from cached_tx.ops.favor import favor_attention, favor_sums
from cached_tx.ops.projections import Rows
from cached_tx.ops.sums import Part, PrefixSums, Sums, joined, packed, unpacked
from cached_tx.types import Heads, Segment


def favor_over(
  axis: str,
  q: Heads,
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  sums: PrefixSums,
  **options: Any,
) -> tuple[Float[Array, "B L H Kv"], PrefixSums]:
  """`favor_attention` inside `jax.shard_map`, the tokens being split over `axis`.

  JAX cannot see that the sums returned are the same everywhere, so `shard_map` is to be
  given check_vma=False:

      split, same = P(None, "sequence"), P()
      own = lambda q, k, v, w, starts, sums: favor_over(
        "sequence", q, k, v, w, Segment(starts), sums
      )
      specs = (split, split, split, same, split, same)
      jax.shard_map(
        own, mesh=mesh, in_specs=specs, out_specs=(split, same), check_vma=False
      )

  Args:
    axis: name of the mesh axis; its devices hold consecutive pieces of equal length.
    q, k, v, segment: the device's own tokens.
    w: projection, the same everywhere.
    sums: sums before the first token of all, the same everywhere.
    **options: features, chunk, span and form, as of `favor_attention`.

  Returns:
    The output for the device's own tokens, and the sums after the last token of all,
    the same everywhere.
  """
  named = ("features", "span")
  shared = {key: options[key] for key in named if options.get(key) is not None}
  parts = _gathered(favor_sums(k, v, w, segment, **shared), axis)
  place = jax.lax.axis_index(axis)
  dtype = jnp.promote_types(sums.top.dtype, parts.sums.top.dtype)
  given = jax.tree.map(lambda x: x.astype(dtype), packed(sums))
  total = Part(given, jnp.zeros(sums.top.shape, bool))

  def join(carry, part):
    total, before, device = carry
    choose = lambda now, x: jnp.where(device == place, now, x)
    before = jax.tree.map(choose, total, before)
    return (joined(total, part), before, device + 1), None

  (total, before, _), _ = jax.lax.scan(join, (total, total, jnp.int32(0)), parts)
  start = unpacked(before.sums)
  out, _ = favor_attention(q, k, v, w, segment, start, **options)
  return out, unpacked(total.sums)


def favor_split(
  axis: str,
  q: Heads,
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  sums: PrefixSums,
  **options: Any,
) -> tuple[Float[Array, "B L H Kv"], PrefixSums]:
  """`favor_attention` over arrays whose tokens lie along one axis of the mesh.

  For programs traced under `jax.set_mesh`; other axes of the mesh are left as they are.

  Args:
    axis: of the mesh; its size divides L.
    q, k, v, w, segment, sums, **options: as of `favor_attention`.
  """
  split, same = PartitionSpec(None, axis), PartitionSpec()

  def own(q, k, v, w, segment, sums):
    return favor_over(axis, q, k, v, w, segment, sums, **options)

  mapped = jax.shard_map(
    own,
    in_specs=(split, split, split, same, split, same),
    out_specs=(split, same),
    axis_names={axis},
    check_vma=False,
  )
  return mapped(q, k, v, w, segment, sums)


def _gathered(own: Part, axis: str) -> Part:
  """The parts of all devices, in one array so that they cross at once."""
  both, top = own.sums
  flat = both.reshape(*top.shape, -1)
  rest = jax.lax.stop_gradient(jnp.stack([top, own.fresh.astype(top.dtype)], axis=-1))
  found = jax.lax.all_gather(jnp.concatenate([flat, rest], axis=-1), axis)
  values = found[..., :-2].reshape(-1, *both.shape)
  found = jax.lax.stop_gradient(found[..., -2:])
  return Part(Sums(values, found[..., 0]), found[..., 1] > 0)
