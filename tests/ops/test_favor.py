import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_tx.ops.favor import (
  favor_attention,
  no_sums,
  orthogonal_projection,
  running_maximum,
)
from cached_tx.types import Segment
from tests.kinds import precision

GOLDEN = Path(__file__).parents[1] / "golden" / "favor_noeps_f64.npz"
B, L, H, K, R = 2, 13, 2, 6, 10


def arrays(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  q, k, v = (scale * rng.normal(size=(B, L, H, K)) for _ in "qkv")
  starts = rng.random((B, L)) < 0.2
  return q, k, v / scale, rng.normal(size=(R, K)), starts


@functools.partial(jax.jit, static_argnames="chunk")
def run(q, k, v, w, starts, valid=None, sums=None, chunk=4):
  if sums is None:
    sums = no_sums(q.shape[0], q.shape[2], w.shape[0], q.shape[3], q.dtype)
  return favor_attention(q, k, v, w, Segment(starts, valid), sums, chunk=chunk)


def pairwise(q, k, v, w, starts):
  """All pairs, in the logarithm: the definition, as far as float64 reaches."""
  log = lambda x: x @ w.T - (x * x).sum(-1, keepdims=True) / 2
  pairs = jax.nn.logsumexp(log(q)[:, :, None] + log(k)[:, None], axis=-1)  # B L L H
  own = jnp.cumsum(starts, axis=1)
  length = q.shape[1]
  seen = jnp.tril(jnp.ones((length, length), bool))[None]
  seen = (seen & (own[:, :, None] == own[:, None]))[..., None]
  weights = jax.nn.softmax(jnp.where(seen, pairs, -jnp.inf), axis=2)
  return jnp.einsum("bqsh,bshk->bqhk", weights, v)


# Worst error measured on CPU, relative to the largest number: 2.8e-15.
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_outputs_and_gradients_equal_those_of_all_pairs(scale):
  q, k, v, w, starts = arrays(0, scale)
  direction = np.random.default_rng(9).normal(size=v.shape)
  with precision("float64"):

    def slopes(function):
      total = lambda q, k, v: (function(q, k, v, w, starts) * direction).sum()
      return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    got = slopes(lambda *args: run(*args)[0])
    want = slopes(pairwise)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max())


@settings(max_examples=6)
@given(chunk=st.sampled_from([1, 2, 5, 13, 64]), seed=st.integers(0, 99))
def test_chunks_change_nothing(chunk, seed):
  with precision("float64"):
    want, sums = run(*arrays(seed), chunk=4)
    got, after = run(*arrays(seed), chunk=chunk)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    for a, b in zip(after, sums, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_the_future_changes_no_bit_of_a_prefix(scale):
  q, k, v, w, starts = (jnp.asarray(a, jnp.float32) for a in arrays(1))
  starts = starts > 0
  want, _ = run(q, k, v, w, starts)
  for cut in (3, 4, 9):  # inside a chunk, and where one begins
    later = jnp.arange(L)[None, :, None, None] >= cut
    got, _ = run(*(jnp.where(later, x * scale + 1, x) for x in (q, k, v)), w, starts)
    np.testing.assert_array_equal(got[:, :cut], want[:, :cut])


@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0, 1e3, 1e6])
def test_gradients_are_finite_at_every_scale(scale):
  q, k, v, w, starts = (jnp.asarray(a, jnp.float32) for a in arrays(2, scale))

  @jax.jit
  def total(q, k, v):
    return (run(q, k, v, w, starts > 0)[0] ** 2).sum()

  out, _ = run(q, k, v, w, starts > 0)
  assert np.isfinite(out).all()
  for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
    assert np.isfinite(gradient).all()


def test_nothing_valid_gives_zero_and_changes_no_sum():
  q, k, v, w, starts = (jnp.asarray(a, jnp.float32) for a in arrays(3))
  _, before = run(q, k, v, w, starts > 0)
  nothing = jnp.zeros((B, L), bool)
  args = (jnp.full_like(q, jnp.nan), k * jnp.nan, v * jnp.inf, w, starts > 2)
  out, after = run(*args, nothing, before)
  assert not np.asarray(out).any()
  for a, b in zip(after, before, strict=True):
    np.testing.assert_array_equal(a, b)


def test_running_maximum_is_that_of_the_document():
  rng = np.random.default_rng(4)
  top = rng.normal(size=(B, L, H)).astype(np.float32)
  starts = rng.random((B, L)) < 0.3
  before = np.full((B, H), 0.5, np.float32)
  want, latest = np.zeros_like(top), before
  for t in range(L):
    latest = np.where(starts[:, t, None], top[:, t], np.maximum(latest, top[:, t]))
    want[:, t] = latest
  got = jax.jit(running_maximum)(jnp.asarray(top), jnp.asarray(starts), before)
  np.testing.assert_array_equal(got, want)


def test_projection_is_orthogonal_and_gaussian():
  draw = lambda key: orthogonal_projection(key, 6, 4)
  w = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
  gram = np.einsum("nrk,nsk->nrs", w[:, :4], w[:, :4])
  off = gram[:, ~np.eye(4, dtype=bool)]
  assert np.abs(off).max() < 1e-4
  # Each entry is N(0, 1): five standard errors around 0, 1, and chi-square's 4.
  for row in (0, 3, 5):
    assert np.abs(w[:, row].mean(axis=0)).max() < 5 / 4000**0.5
    assert np.abs((w[:, row] ** 2).mean(axis=0) - 1).max() < 5 * (2 / 4000) ** 0.5
    assert np.abs((w[:, row] ** 4).mean(axis=0) - 3).max() < 5 * (96 / 4000) ** 0.5


# Worst error measured on CPU, relative to the largest number: 5e-8, of gradients.
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("scale", ["0.4", "1.0", "3.0", "6.0"])
def test_equals_the_definition_computed_elsewhere(scale, masked):
  z = np.load(GOLDEN, allow_pickle=False)
  name = f"uni_s{scale}_{'mask' if masked else 'nomask'}__"
  q, k = (z[x] * np.float32(scale) for x in "qk")  # scaled in float32 there as well
  q, k, v = np.float64(q), np.float64(k), np.float64(z["v"])
  factor = 16**-0.25
  v = np.pad(v, [(0, 0)] * 3 + [(0, 6)])  # to the width of q, with zeros
  starts = np.zeros(q.shape[:2], bool)
  valid = z["mask"] if masked else None
  direction = np.pad(np.float64(z["cotangent"]), [(0, 0)] * 3 + [(0, 6)])
  with precision("float64"):

    def total(q, k, v):  # gradients are those of the scaled q and k
      args = (q * factor, k * factor, v, np.float64(z["W"]), starts, valid)
      out, _ = run(*args, chunk=16)
      return (out * direction).sum(), out

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), slopes = step(q, k, v)
  want = z[name + "out"]
  shown = np.ones_like(z["mask"]) if valid is None else valid
  np.testing.assert_allclose(out[..., :10][shown], want[shown], rtol=0, atol=1e-12)
  assert not np.asarray(out)[~shown].any()  # here a padded token has no output
  if name + "dq" in z.files and not masked:  # its file keeps gradients in float32
    for slope, letter in zip(slopes, "qkv", strict=True):
      want = z[name + f"d{letter}"]
      slope = np.asarray(slope)[..., : want.shape[-1]]
      np.testing.assert_allclose(slope, want, rtol=0, atol=2e-7 * np.abs(want).max())


def test_what_an_older_document_left_is_gone_even_if_it_is_not_a_number():
  q, k, v, w, starts = arrays(3)
  starts[:] = False
  starts[0, 0] = starts[1, 6] = True  # at the border, and within a chunk
  after = np.cumsum(starts, axis=1) > 0
  fresh = no_sums(B, H, R, K)
  spoilt = fresh._replace(
    values=jnp.full_like(fresh.values, jnp.nan), keys=jnp.full_like(fresh.keys, jnp.nan)
  )

  def seen(q, k, v, sums):
    out, state = run(q, k, v, w, starts, None, sums)
    total = jnp.where(after[..., None, None], out, 0).sum()
    return total + state.values.sum(), (out, state)

  slopes = jax.grad(seen, argnums=(0, 1, 2), has_aux=True)
  got, (out, state) = slopes(q, k, v, spoilt)
  want, (out_fresh, state_fresh) = slopes(q, k, v, fresh)
  assert np.isnan(out[~after]).all()  # and never a number that hides it
  np.testing.assert_array_equal(out[after], out_fresh[after])
  for a, b in zip(state, state_fresh, strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a[after], b[after])
