"""Dropout: how much, how independent, and where."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Axes

from cached_tx.layers.dropout import Dropout, kept

SHAPE = (64, 16, 515)  # the last axis is no multiple of 4


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.999])
def test_rate(rate):
  lost = ~np.asarray(kept(jax.random.key(0), rate, SHAPE))
  sigma = np.sqrt(rate * (1 - rate) / lost.size + (0.5 / 256) ** 2 / 1024)
  assert abs(lost.mean() - rate) < 5 * sigma


def test_limits_are_rounded_by_chance():
  lost = ~np.asarray(kept(jax.random.key(1), 0.5 / 256, (4096, 256)))
  none = (lost.sum(axis=1) == 0).mean()  # half of the rows, and e^-1 of the others
  assert abs(none - (0.5 + 0.5 * np.exp(-1))) < 0.04


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3])
def test_neighbours_are_independent(rate):
  lost = ~np.asarray(kept(jax.random.key(2), rate, (512, 1024)))
  for axis in (0, 1):
    for step in (1, 2, 3, 4, 5):
      a = lost.take(range(lost.shape[axis] - step), axis)
      b = lost.take(range(step, lost.shape[axis]), axis)
      assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_scaled_and_off():
  x = jnp.full((8, 128), 3.0)
  layer = Dropout(0.25)
  y = layer.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
  assert set(np.unique(np.asarray(y))) == {0.0, 4.0}
  chex.assert_trees_all_equal(layer.apply({}, x, deterministic=True), x)
  chex.assert_trees_all_equal(Dropout(0.0).apply({}, x, deterministic=False), x)


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3])
def test_half_precision_scales_by_the_rate(rate):
  """0.9 is no bfloat16: dividing by what it rounds to changes all numbers alike."""
  key, x = jax.random.key(4), jax.random.uniform(jax.random.key(5), (512, 512))
  x = (1 + x).astype(jnp.bfloat16)
  y = Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})
  assert y.dtype == jnp.bfloat16
  x, y = np.float64(x), np.float64(y)
  ratio = (y[y > 0] / x[y > 0]).mean() * (1 - rate)
  assert abs(ratio - 1) < 1e-4  # single ones are rounded by up to 2e-3


@pytest.mark.parametrize("axes", [("a",), (None, "a"), (None, None, "a")])
def test_the_same_on_any_layout(axes):
  mesh = Mesh(np.array(jax.devices()), ("a",))
  draw = lambda key: kept(key, 0.1, (8, 16, 64))
  place = NamedSharding(mesh, Axes(*axes))
  key = jax.random.key(3)
  spread = jax.jit(draw, out_shardings=place)(key)
  assert len(spread.sharding.device_set) == 8
  chex.assert_trees_all_equal(np.asarray(spread), np.asarray(jax.jit(draw)(key)))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_rates_out_of_range_are_refused(rate):
  with pytest.raises(ValueError, match=r"model\.dropout.*at least 0 and below 1"):
    Dropout(rate).apply({}, jnp.ones((2, 4)), deterministic=True)
