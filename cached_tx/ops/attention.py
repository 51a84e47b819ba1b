"""Exact softmax attention over an explicit set of keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Queries = Float[Array, "B Q H K"]
Keys = Float[Array, "B S H K"]
Values = Float[Array, "B S H Kv"]
Scores = Float[Array, "B H Q S"]


def softmax_attention(
  q: Queries,
  k: Keys,
  v: Values,
  mask: Bool[Array, "B #Q S"],
  scores: Float[Array, "#B #H Q S"] | None = None,
  dropout: Callable[[Array], Array] | None = None,
  zeros: Bool[Array, "B #Q S"] | None = None,
) -> Float[Array, "B Q H Kv"]:
  """softmax(q k^T + scores) v over the keys that `mask` shows to each query.

  The exponent, the sum and the product are taken before the division, so that
  the division touches Q x K numbers instead of Q x S.

  Args:
    q: any float dtype, already scaled by K ** -0.5.
    k, v: any float dtype; entries that no query may see must be finite.
    mask: which keys a query sees.
    scores: added to the product of q and k, on the same scale.
    dropout: applied to the weights.
    zeros: which keys count, for a query, as zero tokens: their product with it and
      their value are 0, whatever k and v hold there.

  Returns:
    The mean of v under the weights, in the dtype of v; 0 where a query sees no key.
    Computed in float32 at least.
  """
  weights, total = _exponents(q, k, mask, scores, zeros)
  if dropout is not None:
    weights = dropout(weights)
  out = jnp.einsum(
    "bhqs,bshk->bqhk", weights.astype(v.dtype), v, preferred_element_type=weights.dtype
  )
  return (out / jnp.swapaxes(total, 1, 2)).astype(v.dtype)


def attention_weights(
  q: Queries,
  k: Keys,
  mask: Bool[Array, "B #Q S"],
  scores: Float[Array, "#B #H Q S"] | None = None,
  zeros: Bool[Array, "B #Q S"] | None = None,
) -> Scores:
  """The weights that `softmax_attention` gives to keys, 0 where they count as zeros."""
  weights, total = _exponents(q, k, mask, scores, zeros)
  return weights / total


def _exponents(
  q: Queries,
  k: Keys,
  mask: Bool[Array, "B #Q S"],
  scores: Float[Array, "#B #H Q S"] | None,
  zeros: Bool[Array, "B #Q S"] | None,
) -> tuple[Scores, Float[Array, "B H Q 1"]]:
  """Weights before the division, relative to a query's largest, and what divides them.

  Keys that count as zeros are in the sum and have no weight.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=wide)
  if zeros is not None:
    logits = jnp.where(zeros[:, None], 0, logits)
  if scores is not None:
    logits = logits + jnp.broadcast_to(scores, logits.shape).astype(logits.dtype)
  logits = jnp.where(mask[:, None], logits, -jnp.inf)
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
  total = weights.sum(axis=-1, keepdims=True)
  if zeros is not None:
    weights = jnp.where(zeros[:, None], 0, weights)
  return weights, jnp.where(total > 0, total, 1)
