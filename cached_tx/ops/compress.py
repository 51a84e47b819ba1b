"""Fewer slots from more tokens: Rae et al., 2019, arXiv:1911.05507, section 3.2."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from cached_tx.ops.resample import blocks
from cached_tx.types import Hidden, Mask, Memory, PerRow, SlotMask

ORDERS = ("time", "usage")
NORMS = ("l2", "mse")


class Reach(NamedTuple):
  """Which tokens of a block of n become which slot.

  Slot m sees `span` tokens from m rate - left on. Tokens before the block count as 0.
  """

  rate: int
  span: int
  left: int = 0

  def count(self, tokens: int) -> int:
    """Slots made of a block of n tokens, the oldest first."""
    return max((tokens + self.left - self.span) // self.rate + 1, 0)

  def rest(self, tokens: int) -> int:
    """How many of the newest tokens of a block no slot sees."""
    slots = self.count(tokens)
    return tokens + self.left - self.span - (slots - 1) * self.rate if slots else tokens


def all_valid(valid: Mask, reach: Reach) -> SlotMask:
  """True for a slot all of whose tokens are valid; those before the block are none."""
  L = valid.shape[1]
  places = _windows(reach.count(L), reach.span, reach.rate) - reach.left
  inside = jnp.take(valid, np.maximum(places, 0).reshape(-1), axis=1)
  inside = inside.reshape(valid.shape[0], *places.shape)
  return (inside | jnp.asarray(places < 0)[None]).all(axis=2)


def _windows(count: int, span: int, stride: int) -> Int[np.ndarray, "M span"]:
  return np.arange(count)[:, None] * stride + np.arange(span)[None]


def mean_pool(x: Hidden, rate: int) -> Memory:
  """The mean of each `rate` neighbours. The newest L mod rate tokens have no slot."""
  return blocks(_whole(x, rate), rate).mean(axis=2)


def max_pool(x: Hidden, valid: Mask, rate: int) -> Memory:
  """The largest of each `rate` neighbours, by channel, among the valid ones.

  0 where none of them is valid. Tokens at the end as of `mean_pool`.
  """
  shown = _whole(jnp.where(valid[..., None], x, -jnp.inf), rate)
  some = blocks(_whole(valid[..., None], rate), rate).any(axis=2)
  return jnp.where(some, blocks(shown, rate).max(axis=2), 0).astype(x.dtype)


def _whole(x: Shaped[Array, "B L D"], rate: int) -> Shaped[Array, "B L1 D"]:
  return x[:, : x.shape[1] // rate * rate]


def convolve(
  x: Hidden,
  kernel: Float[Array, "taps D D"],
  stride: int = 1,
  dilation: int = 1,
  left: int = 0,
) -> Float[Array, "B M D"]:
  """A convolution along the tokens, without bias; the last tap meets the newest token.

  Args:
    x: any float dtype.
    kernel: sets the dtype of the products, together with x.
    stride: tokens between two outputs.
    dilation: tokens between two taps.
    left: zeros before the first token.

  Returns:
    M = (L + left - (taps - 1) dilation - 1) // stride + 1 outputs.
  """
  taps = kernel.shape[0]
  x = jnp.pad(x, ((0, 0), (left, 0), (0, 0)))
  M = (x.shape[1] - (taps - 1) * dilation - 1) // stride + 1
  if taps == stride and dilation == 1:
    seen = blocks(x[:, : M * taps], taps)
  else:
    last = (M - 1) * stride + 1
    first = [k * dilation for k in range(taps)]
    seen = jnp.stack([x[:, k : k + last : stride] for k in first], axis=2)
  return jnp.einsum("bmrd,rde->bme", seen, kernel)


def spread(parts: Float[Array, "B M taps D"], rate: int) -> Float[Array, "B L D"]:
  """Adds up what slots say of their tokens: slot m of tokens m rate, m rate + 1, ...

  The transpose of the windows of a convolution with stride `rate`: L = (M - 1) rate +
  taps tokens.
  """
  B, M, taps, D = parts.shape
  if taps == rate:
    return parts.reshape(B, M * taps, D)
  places = _windows(M, taps, rate).reshape(-1)
  out = jnp.zeros((B, (M - 1) * rate + taps, D), parts.dtype)
  return out.at[:, places].add(parts.reshape(B, M * taps, D))


def most_used(
  usage: Float[Array, "B L"], valid: Mask, slots: int, order: str = "time"
) -> Int[Array, "B M"]:
  """Indices of the M tokens that are used most; of equals, the oldest.

  Args:
    usage: any scale.
    valid: tokens that are not come after all others.
    slots: M, at most L.
    order: time, the oldest first; or usage, the most used first.
  """
  ranked = jnp.argsort(jnp.where(valid, -usage, jnp.inf), axis=1, stable=True)
  best = ranked[:, :slots]
  return jnp.sort(best, axis=1) if order == "time" else best


def size_of_gap(
  gap: Float[Array, "B L ..."], counted: Bool[Array, "B L"], norm: str = "l2"
) -> PerRow:
  """The length of each row's difference; 0, with gradient 0, where there is none.

  Args:
    gap: any float dtype; computed in float32 or wider.
    counted: what is not counts as no difference.
    norm: l2, the root of the sum of squares; or mse, the mean of the squares counted.
  """
  gap = gap.astype(jnp.promote_types(gap.dtype, jnp.float32))
  axes = tuple(range(1, gap.ndim))
  counted = jnp.expand_dims(counted, axes[1:])
  square = jnp.where(counted, gap * gap, 0).sum(axis=axes)
  if norm == "mse":
    each = math.prod(gap.shape[2:])
    return square / jnp.maximum(counted.sum(axis=axes) * each, 1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
