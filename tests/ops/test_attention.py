import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.attention import softmax_attention
from tests.kinds import precision

B, Q, S, H, K = 2, 3, 5, 2, 7


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, n, H, K)) for n in (Q, S, S))
  mask = rng.random((B, Q, S)) < 0.6
  mask[0, 1] = False  # a query that sees nothing
  return q, k, v, mask, rng.normal(size=(B, H, Q, S))


def reference(q, k, v, mask, scores):
  out = np.zeros((B, Q, H, K))
  for b, i, h in np.ndindex(B, Q, H):
    seen = np.flatnonzero(mask[b, i])
    if len(seen):
      e = np.exp([q[b, i, h] @ k[b, j, h] + scores[b, h, i, j] for j in seen])
      out[b, i, h] = (e / e.sum()) @ v[b, seen, h]
  return out


# Worst error measured on CPU: 8.9e-16, 5.2e-7.
@pytest.mark.parametrize("dtype,atol", [("float64", 1e-14), ("float32", 2e-6)])
def test_equals_its_definition(dtype, atol):
  q, k, v, mask, scores = arrays()
  want = reference(q, k, v, mask, scores)
  with precision(dtype):
    q, k, v, scores = (jnp.asarray(a, dtype) for a in (q, k, v, scores))
    got = softmax_attention(q, k, v, jnp.asarray(mask), scores)
  assert got.dtype == dtype
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)
  assert not got[0, 1].any()


def test_scores_of_any_size_overflow_nothing():
  q, k, v, mask, scores = (jnp.asarray(a) for a in arrays())
  got = softmax_attention(q * 1e4, k * 1e4, v, mask, scores)
  assert np.isfinite(got).all()


def test_gradients_are_finite_and_zero_for_what_is_masked():
  q, k, v, mask, scores = (jnp.asarray(a) for a in arrays())
  hide = mask.at[:, :, 2].set(False)
  args = (q, k.at[:, 2].set(1e30), v.at[:, 2].set(1e30), scores)

  def total(q, k, v, scores):
    return (softmax_attention(q, k, v, hide, scores) ** 2).sum()

  dq, dk, dv, ds = jax.grad(total, argnums=(0, 1, 2, 3))(*args)
  for gradient in (dq, dk, dv, ds):
    assert np.isfinite(gradient).all()
  assert not dq[0, 1].any() and not dk[:, 2].any() and not dv[:, 2].any()
  assert not np.asarray(ds)[~np.broadcast_to(hide[:, None], ds.shape)].any()


def test_a_key_may_count_as_zeros_for_some_queries():
  q, k, v, mask, scores = arrays(1)
  zeros = np.zeros(mask.shape, bool)
  zeros[0, 0, 1:3] = zeros[1, 2, 0] = True
  mask = mask | zeros
  with precision("float64"):
    args = (jnp.asarray(a) for a in (q, k, v, mask, scores))
    got = softmax_attention(*args, zeros=jnp.asarray(zeros))
  for b, i in ((0, 0), (1, 2)):
    gone = zeros[b, i][None, :, None, None]
    own = (q, np.where(gone, 0, k), np.where(gone, 0, v), mask, scores)
    np.testing.assert_allclose(got[b, i], reference(*own)[b, i], rtol=0, atol=1e-14)


def test_dropout_acts_on_weights_already_normalised():
  q, k, v, mask, scores = (jnp.asarray(a) for a in arrays())
  twice = softmax_attention(q, k, v, mask, scores, dropout=lambda p: 2 * p)
  np.testing.assert_allclose(twice, 2 * softmax_attention(q, k, v, mask, scores))
