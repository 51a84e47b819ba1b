"""Fingerprints: the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cached_tx.ops.fingerprint import describe, fingerprints, named_leaves

DTYPES = [
  *("int4", "uint2", "int8", "uint16", "int32", "bool", "float8_e5m2", "float16"),
  *("bfloat16", "float32", "complex64"),
]


def reference(words):
  """A loop in Python's own integers."""
  words = np.asarray(words).ravel().tolist()
  return sum(w * (2 * i + 1) for i, w in enumerate(words)) % 2**32


def values(dtype, shape=(8, 6)):
  bits = np.random.default_rng(0).integers(0, 2, shape)
  return jnp.asarray(bits).astype(dtype)


def of(x):
  return fingerprints({"x": x})["x"]


def test_words_against_a_loop():
  x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
  assert of(jnp.asarray(x)) == reference(x.view(np.uint32))
  half = jnp.asarray(x, jnp.bfloat16)
  assert of(half) == reference(np.asarray(half).view(np.uint16))
  key = jax.random.split(jax.random.key(3), 4)
  assert of(key) == reference(jax.random.key_data(key))
  assert of(jnp.zeros((0, 3))) == 0
  assert of(jnp.uint32(7)) == 7


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_64_bits(x64, dtype):
  x = np.random.default_rng(0).integers(0, 2**40, (5, 3)).astype(dtype)
  assert of(jnp.asarray(x)) == reference(x.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_one_change_is_seen(dtype):
  bits = np.random.default_rng(0).integers(0, 2, (8, 6))
  seen = {of(jnp.asarray(bits).astype(dtype))}
  for row in range(8):
    for column in range(6):
      other = bits.copy()
      other[row, column] ^= 1
      seen.add(of(jnp.asarray(other).astype(dtype)))
  assert len(seen) == 1 + 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "complex64"])
def test_the_same_on_every_mesh(dtype):
  x = values(dtype)
  want = of(x)
  for shape, spec in [((4, 2), ("a", "b")), ((8, 1), ("a", "b")), ((2, 2), ("b",))]:
    mesh = jax.make_mesh(
      shape,
      ("a", "b"),
      devices=jax.devices()[: shape[0] * shape[1]],
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprints({"placed": placed, "x": x}) == {"placed": want, "x": want}


def test_names():
  tree = {"a": (None, {"b": 1}, [2]), "c": ()}
  assert named_leaves(tree) == {"a/1/b": 1, "a/2/0": 2}
  with pytest.raises(ValueError, match="'a/b'"):
    named_leaves({"a": {"b": 1}, "a/b": 2})
  assert describe(jax.random.key(0)) == {"shape": [], "dtype": "key<fry>"}
