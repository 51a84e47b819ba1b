import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.positions import (
  by_key,
  flattened,
  rotary_angles,
  rotate,
  sinusoids,
  sliced,
)
from tests.kinds import precision
from tests.official_xl import load

FAR = 12_345_678


@pytest.mark.parametrize(
  "queries,memory", [(1, 0), (1, 3), (2, 0), (3, 1), (4, 7), (6, 5)]
)
def test_by_key_is_a_gather_without_wrapped_entries(queries, memory):
  keys = memory + queries
  scores = np.random.default_rng(0).normal(size=(2, 3, queries, keys))
  want = np.zeros((2, 3, queries, keys))
  for i in range(queries):
    for j in range(memory + i + 1):  # later keys: 0, not another row's entries
      want[:, :, i, j] = scores[:, :, i, keys - 1 - (memory + i - j)]
  with precision("float64"):
    got = jax.jit(by_key)(scores)
    # What is read from a place gives its gradient to that place.
    slopes = np.random.default_rng(1).normal(size=scores.shape)
    (back,) = jax.vjp(jax.jit(by_key), scores)[1](jnp.asarray(slopes))
    ways = [jax.jit(way)(slopes) for way in (sliced, flattened)]
    moved = jax.jvp(by_key, (scores,), (jnp.asarray(slopes),))[1]  # forward mode too
    np.testing.assert_array_equal(moved, by_key(jnp.asarray(slopes)))
  np.testing.assert_array_equal(got, want)
  wanted = np.zeros_like(scores)
  for i in range(queries):
    for j in range(memory + i + 1):
      wanted[:, :, i, keys - 1 - (memory + i - j)] = slopes[:, :, i, j]
  for way in (back, *ways):
    np.testing.assert_array_equal(way, wanted)


def test_by_key_equals_the_official_shift_where_a_query_may_look():
  """Elsewhere the official one has entries of the next row, and this has 0."""
  _, arrays = load("a_rel_attn_postln_mem7")
  by_query = lambda name: arrays[f"step2/{name}"].transpose(2, 3, 0, 1)  # B H Q S
  before, official = by_query("BD_before_shift"), by_query("BD_after_shift_official")
  with precision("float64"):
    got = np.asarray(by_key(jnp.asarray(before)))
  hidden = arrays["step2/mask_true_means_hidden"].astype(bool)
  hidden = hidden.reshape(hidden.shape[:2])[None, None] & np.ones_like(got, bool)
  np.testing.assert_array_equal(got[~hidden], official[~hidden])
  np.testing.assert_array_equal(got, by_query("BD_after_shift_valid_only"))
  assert not got[hidden].any() and official[hidden].any()


# Worst error measured on CPU: 3.6e-7.
def test_rotary_depends_on_distance_alone_however_far():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 64)), jnp.float32) for _ in "qk")
  q, k = q / np.sqrt(8), k / np.sqrt(8)

  def product(position, distance):
    at = lambda p: jnp.array([[p]], jnp.int32)
    return (rotate(q, at(position + distance)) * rotate(k, at(position))).sum(-1)

  for distance in (0, 1, 7, 1000):
    near, far = product(0, distance), product(FAR, distance)
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-6)
    assert np.abs(near).max() > 0.05


def test_rotary_wraps_as_angles_do():
  """Past 2**31, where an int32 count has turned negative."""
  places = jnp.array([2**31 - 2, 2**31 - 1, -(2**31), -(2**31) + 1], jnp.int32)
  turns = np.diff(np.asarray(rotary_angles(places, 8)), axis=0) / (2 * np.pi)
  one = np.asarray(rotary_angles(jnp.array([1], jnp.int32), 8)) / (2 * np.pi)
  difference = (turns - one + 0.5) % 1 - 0.5
  np.testing.assert_allclose(difference, np.zeros_like(turns), atol=2e-7)


@pytest.mark.parametrize("width", [2, 6, 64])
def test_rotary_frequencies(width):
  with precision("float64"):
    got = rotary_angles(jnp.arange(5, dtype=jnp.int32), width)
  planes = np.arange(width // 2) / (width // 2)
  want = np.arange(5)[:, None] * 10_000.0**-planes
  np.testing.assert_allclose(np.cos(got), np.cos(want), atol=1e-8)
  np.testing.assert_allclose(np.sin(got), np.sin(want), atol=1e-8)


def test_rotation_keeps_lengths():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2, 6)), jnp.float32)
  y = rotate(x, jnp.array([[5, FAR, 7]], jnp.int32))
  np.testing.assert_allclose((y * y).sum(-1), (x * x).sum(-1), rtol=1e-5)


def test_sinusoids_are_sines_then_cosines():
  got = sinusoids(jnp.array([3, 0], jnp.int32), 4)
  angles = 3 * np.array([1, 0.01])
  want = [[*np.sin(angles), *np.cos(angles)], [0, 0, 1, 1]]
  np.testing.assert_allclose(got, want, atol=1e-6)
