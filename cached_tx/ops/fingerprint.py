"""Names, shapes and fingerprints of the arrays in a state.

A fingerprint is one uint32 for each array: the sum of its 32-bit words (16-bit
and 8-bit elements are widened), each times an odd weight of its position,
modulo 2**32. A sum modulo 2**32 does not depend on the order of its terms, so
the same values give the same fingerprint on any mesh. A weight is odd, hence
invertible: a change of any one element is always seen.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree by path, such as `params/layers/kernel`.

  None and empty containers have no leaf and no name.

  Raises:
    ValueError: two leaves share one path (a key that contains a slash).
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaves:
      raise ValueError(
        f"two arrays of the state have the path {name!r}: rename one, the paths"
        " are their names in files"
      )
    leaves[name] = leaf
  return leaves


def is_key(leaf: Any) -> bool:
  """Whether `leaf` is an array of typed PRNG keys."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> dict[str, Any]:
  """Returns the shape and dtype of an array (or its abstract form) as JSON."""
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns the fingerprint of every array, a number below 2**32.

  Computed on the devices that hold the arrays, one program for all of them.
  Waits for the arrays. Every process of a run must call it, with the same
  names.
  """
  groups: dict[frozenset, list[str]] = {}
  for name, leaf in leaves.items():  # one program cannot span two sets of devices
    groups.setdefault(frozenset(leaf.sharding.device_set), []).append(name)
  result: dict[str, int] = {}
  for names in groups.values():
    arrays = [leaves[name] for name in names]
    shardings = (x.sharding for x in arrays)
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    sums = np.asarray(_program(mesh)(arrays))
    result.update(zip(names, sums.tolist(), strict=True))
  return {name: result[name] for name in leaves}


def _all_sums(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([_weighted_sum(x) for x in arrays])


@functools.cache
def _program(mesh: jax.sharding.Mesh | None):
  """`_all_sums` compiled, with a result that every process of a mesh can read."""
  if mesh is None:
    return jax.jit(_all_sums)
  return jax.jit(_all_sums, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _weighted_sum(x: jax.Array) -> jax.Array:
  u = _words(x)
  index = jnp.zeros(u.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(u.ndim)):  # no reshape: it would gather the shards
    steps = jax.lax.broadcasted_iota(jnp.uint32, u.shape, axis)
    index += steps * np.uint32(stride % 2**32)
    stride *= u.shape[axis]
  return jnp.sum(u * (2 * index + 1), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
  """The bits of `x` as uint32; 8-byte elements add an axis of two."""
  if is_key(x):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  elif jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  elif _bits(x.dtype) < 8:  # int4 and the like widen without loss
    x = x.astype(jnp.int8 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _bits(dtype) -> int:
  info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
  return info(dtype).bits
