"""Softmax attention to all tokens: Vaswani et al., 2017, arXiv:1706.03762."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import KERNELS, kernel_for
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.blockwise import blockwise_attention
from cached_tx.ops.sight import Sight
from cached_tx.types import DType, Heads, Hidden, Segment


class TransformerAttention(nn.Module):
  """Every token attends to all real tokens of its row; returns heads.

  A row is one document: `segment.starts` is not looked at. Time is quadratic in L;
  memory is linear where scores are taken by blocks (`kernel`).

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    bias: whether queries, keys and values have biases.
    kernel: dense holds the scores of all pairs, as the published code does; blocks
      those of a block, in memory linear in L; auto takes what is faster. It changes
      rounding, speed and memory, and no dropped weight.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  bias: bool = False
  kernel: str = "auto"
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    if self.kernel not in KERNELS:
      raise ValueError(
        f"attention.kernel is {self.kernel!r}; one of {', '.join(KERNELS)}"
      )

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
    return blockwise_attention(
      q * self.head_width**-0.5,
      k,
      v,
      Sight(key_valid=segment.real),
      causal=False,
      offset=0,
      drop=Dropout(self.dropout).drop(deterministic),
      kernel=kernel_for(self.kernel, x.shape[1]),
    )
