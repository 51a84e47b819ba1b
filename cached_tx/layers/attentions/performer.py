"""FAVOR+: Choromanski et al., 2021, arXiv:2009.14794."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.attentions.checks import no_weights, read_by_features
from cached_tx.layers.favor import FavorEncoderAttention
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.choices import check_rows
from cached_tx.ops.favor import favor_bidirectional
from cached_tx.ops.features import FEATURES
from cached_tx.ops.projections import Rows
from cached_tx.types import DType, Heads, Hidden, Segment


class PerformerAttention(nn.Module):
  """Softmax attention to all real tokens of a row, estimated by features; heads.

  `FavorEncoderAttention` of rows that are one document each (`segment.starts` is not
  looked at), with a width of heads of its own. Time and memory are linear in L, also
  beside a cache, which is read the same way. The
  code of the Long Range Arena has kernel="relu", projection="none" by default.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    features, kernel, projection, seed, layer: as of `FavorEncoderAttention`.
    bias: whether queries, keys and values have biases.
    dropout: 0: there are no weights to drop.
    dtype: of the computation. Parameters are float32, features and sums at least.
  """

  heads: int
  head_width: int
  features: int = FavorEncoderAttention.features
  kernel: str = "positive"
  projection: str = "orthogonal"
  seed: int = 0
  layer: int = 0
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def _favor(self, width: int = 0) -> FavorEncoderAttention:
    """What checks the options and draws the rows, of heads of another width too."""
    return FavorEncoderAttention(
      self.heads * (width or self.head_width),
      self.heads,
      self.features,
      self.kernel,
      self.projection,
      self.seed,
      self.layer,
      parent=None,
    )

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    no_weights(self.dropout)
    options = self.kernel, self.projection, self.features
    usual = FavorEncoderAttention.features
    check_rows(*options, self.head_width, usual, prefix="attention.")

  @nn.nowrap
  def draw(self) -> Rows | None:
    """The rows, float32; None where features are made without."""
    return self._favor().draw()

  @nn.nowrap
  def reader(self, width: int) -> Callable[..., Heads]:
    """How a cache beside it is read, in heads of `width`: by features too.

    Returns a kernel as of `GatedEncoderAttention`, whose queries are scaled.
    """
    rows = self._favor(width).draw()
    return partial(read_by_features, self.kernel, rows, width**0.25, width**-0.25)

  @nn.compact
  def __call__(
    self,
    x: Hidden,
    segment: Segment,
    *,
    rows: Rows | None = None,
    deterministic: bool = True,
  ) -> Heads:
    """Returns B L H K, 0 at padding. `x` is 0 there; `rows` replace the layer's own."""
    del deterministic
    self.check()
    rows = self._favor().rows_or(rows)
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    scale, real = self.head_width**-0.25, segment.valid
    return favor_bidirectional(
      q * scale,
      k * scale,
      v,
      rows,
      queries=real,
      keys=real,
      features=FEATURES[self.kernel],
    )
