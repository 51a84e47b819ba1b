"""Dropout whose random bits are cheap, and the same on every layout of devices."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.ops.bits import Drop

_LEVELS = 256  # that a byte tells apart
RATES = "model.dropout, or model.attention_dropout,"


def check_rate(rate: float, name: str) -> None:
  """Raises ValueError, naming the config key, if a rate is no chance to be dropped."""
  if not 0 <= rate < 1:
    raise ValueError(f"{name} is {rate}; a rate must be at least 0 and below 1")


def kept(key: Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
  """Which numbers stay: each with probability 1 - rate, in expectation exactly.

  A random word of 32 bits decides about four numbers, a byte each: random bits are most
  of what dropout costs on a CPU. Of the 256 values of a byte, 256 rate drop a number,
  rounded up or down for each row of the last axis by chance; two numbers of a row are
  thereby correlated, by 4e-5 at a rate of 0.1.

  Args:
    key: of jax.random; its bits do not depend on how arrays are sharded.
    rate: at least 0, below 1.
    shape: of the numbers; at least one axis.
  """
  *leading, last = shape
  of_words, of_limits = jax.random.split(key)
  words = jax.random.bits(of_words, (*leading, -(-last // 4)), jnp.uint32)
  levels = jax.lax.bitcast_convert_type(words, jnp.uint8)  # ... words 4
  levels = levels.reshape(*leading, -1)[..., :last].astype(jnp.int32)
  whole = int(rate * _LEVELS)
  rest = rate * _LEVELS - whole
  if not rest:
    return levels >= whole
  up = jax.random.bernoulli(of_limits, rest, (*leading, 1))
  return levels >= whole + up.astype(jnp.int32)


class Dropout(nn.Module):
  """Sets numbers to 0 by chance, and scales the others up; see `kept`.

  Attributes:
    rate: the chance; at least 0, below 1.
  """

  rate: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "..."], *, deterministic: bool
  ) -> Float[Array, "..."]:
    """Returns x / (1 - rate) or 0; x itself if `deterministic`.

    Needs the rng "dropout" otherwise.

    Raises:
      ValueError: the rate is out of its range.
    """
    check_rate(self.rate, RATES)
    if deterministic or not self.rate:
      return x
    mask = kept(self.make_rng("dropout"), self.rate, x.shape)
    # 1 - rate is no number of 8 bits: rounded, it would scale all alike by up to 0.2 %.
    scaled = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / (1 - self.rate)
    return jnp.where(mask, scaled.astype(x.dtype), 0)

  def drop(self, deterministic: bool) -> Drop | None:
    """What `blockwise_attention` drops weights by; None where none are dropped."""
    check_rate(self.rate, RATES)
    if deterministic or not self.rate:
      return None
    return Drop(self.make_rng("dropout"), self.rate)

  @nn.nowrap
  def function(self, deterministic: bool) -> Callable[[Array], Array] | None:
    """What drops numbers; None where none are."""
    if deterministic or not self.rate:
      return None
    return partial(self, deterministic=False)
