"""From a mesh in the config to arrays that are born in their place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh  # without devices: for shapes alone
AXES = ("data", "fsdp", "tensor", "sequence")
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("head_width", None),
  ("layers", None),
)


def make_mesh(data: int, fsdp: int, tensor: int, sequence: int) -> Mesh:
  """The mesh of a config's section `mesh`, over all devices of all processes.

  Args:
    data: devices among which rows are divided; -1 in one place means the rest.
    fsdp: devices among which rows and parameters are divided.
    tensor: devices among which heads and MLP channels are divided.
    sequence: devices among which the tokens of a segment are divided.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  sizes = [data, fsdp, tensor, sequence]
  count = jax.device_count()
  text = ", ".join(f"mesh.{n}={s}" for n, s in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ValueError(f"{text}: sizes are 1 or more, and -1 (the rest) at most once")
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if int(np.prod(sizes)) != count:
    raise ValueError(f"{text} do not multiply to the {count} devices there are")
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def on(mesh: Mesh) -> Iterator[None]:
  """Within it, programs are traced for this mesh, by the rules of logical axes."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def one_device() -> Mesh:
  """The mesh of this process's first device, whatever others there are."""
  devices = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def unboxed(params: Any) -> Any:
  """The arrays in their boxes, without a constraint on where they lie."""
  return jax.tree.map(
    lambda box: box.value if isinstance(box, nn.LogicallyPartitioned) else box,
    params,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )


def parameter_shardings(boxed: Any, mesh: AnyMesh) -> Any:
  """Shardings of parameters by the logical names that they carry.

  A dimension that its mesh axes do not divide stays whole (the 257 rows of a byte
  embedding, say); `cached-tx inspect` shows what became of each array.
  """
  places: Any = mesh  # Flax asks for one with devices, and does not need them
  specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), places, RULES)
  return jax.tree.map(lambda s, a: _fitting(s, a, mesh), specs, unboxed(boxed))


def _fitting(sharding: NamedSharding, array: Any, mesh: AnyMesh) -> NamedSharding:
  spec = list(sharding.spec) + [None] * (len(array.shape) - len(sharding.spec))
  for i, axes in enumerate(spec):
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    if array.shape[i] % int(np.prod([mesh.shape[n] for n in names])):
      spec[i] = None
  return NamedSharding(mesh, PartitionSpec(*spec))


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
  """Shardings for a tree that holds copies of the parameters, an optimiser's state.

  A leaf whose path ends in a parameter's path, and that has its shape, lies where the
  parameter lies; the rest is replicated.
  """
  known = {
    _names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(shardings),
      strict=True,
    )
  }
  longest = max(map(len, known))

  def place(path, leaf):
    names = _names(path)
    for length in range(min(longest, len(names)), 0, -1):
      shape, sharding = known.get(names[-length:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(place, tree)


def _names(path: tuple) -> tuple[str, ...]:
  return tuple(
    str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path
  )


def replicated(mesh: AnyMesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: AnyMesh, leading: int = 0) -> NamedSharding:
  """Rows divided among the devices, behind `leading` axes that are not."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))


def memory_shardings(state: Any, mesh: AnyMesh) -> Any:
  """Shardings of a model's memory, whose leaves lead with G, then B.

  Leaves without elements (a memory of 0 slots) are replicated: arrays of no size
  come out of a sharded program with wrong shapes (seen with JAX 0.10).
  """
  by_row, whole = rows(mesh, leading=1), replicated(mesh)
  return jax.tree.map(lambda a: by_row if a.size else whole, state)
