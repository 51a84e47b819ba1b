"""Attention within blocks: the local baseline of Tay et al., 2021, arXiv:2011.04006."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.banded import check_size, local_attention
from cached_tx.types import DType, Heads, Hidden, Segment


class LocalAttention(nn.Module):
  """Every token attends the tokens of its block; returns heads.

  Blocks are consecutive tokens, counted from the row's first. A row is one document:
  `segment.starts` is not looked at. Time and memory are linear in L.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    block: tokens of a block.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  block: int = 50
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    check_size("attention.block", self.block)

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding."""
    self.check()
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    return local_attention(
      q * self.head_width**-0.5,
      k,
      v,
      segment.real,
      block=self.block,
      drop=Dropout(self.dropout).drop(deterministic),
    )
