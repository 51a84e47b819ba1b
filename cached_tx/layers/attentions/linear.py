"""Linear attention with elu(x) + 1: Katharopoulos et al., 2020, arXiv:2006.16236."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.attentions.checks import no_weights, read_by_features
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.favor import favor_bidirectional
from cached_tx.ops.features import FEATURES
from cached_tx.types import DType, Heads, Hidden, Segment


class LinearAttention(nn.Module):
  """phi(q) (sum phi(k) v^T) / (phi(q) sum phi(k)) over the row's real tokens; heads.

  phi(x) = elu(x) + 1 of queries and keys as they are, without a scale (equations 5 and
  7). Nothing is added to the denominator, which is positive. A row is one document:
  `segment.starts` is not looked at. Time and memory are linear in L, also beside a
  cache, which is read the same way.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    bias: whether queries, keys and values have biases.
    dropout: 0: there are no weights to drop.
    dtype: of the computation. Parameters are float32, features and sums at least.
  """

  heads: int
  head_width: int
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    no_weights(self.dropout)

  @nn.nowrap
  def reader(self, width: int) -> Callable[..., Heads]:
    """How a cache beside it is read, in heads of `width`: by the same features.

    Returns a kernel as of `GatedEncoderAttention`, whose queries are scaled.
    """
    return partial(read_by_features, "elu1", None, width**0.5, 1.0)

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K, 0 at padding. `x` is 0 there."""
    del deterministic
    self.check()
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    real = segment.valid
    return favor_bidirectional(
      q, k, v, None, queries=real, keys=real, features=FEATURES["elu1"]
    )
