"""The fixed pattern of Sparse Transformers: Child et al., 2019, arXiv:1904.10509."""

import math

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.banded import check_size
from cached_tx.ops.fixed import fixed_attention
from cached_tx.types import DType, Heads, Hidden, Segment


class SparseAttention(nn.Module):
  """A token attends its block so far, and the ends of earlier blocks; returns heads.

  See `fixed_attention`. It is causal, as in the paper: a token but those of the prefix
  sees nothing after it. A row is one document: `segment.starts` is not looked at.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    max_len: the most tokens of a row; what `block` is chosen by.
    block: tokens of a block, l in the paper. 0: the root of summary x max_len, with
      which time and memory grow as max_len^1.5.
    summary: tokens at the end of each block that all later blocks see, c in the paper.
    prefix: so many tokens at the row's beginning see all, and all see them: 1 for a
      class token, which would see only itself.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  max_len: int
  block: int = 0
  summary: int = 10
  prefix: int = 1
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @property
  def causal(self) -> bool:
    """Whether the first token sees no other."""
    return not self.prefix

  @property
  def size(self) -> int:
    """Tokens of a block."""
    least = max(math.isqrt(self.summary * self.max_len), self.summary)
    return self.block or max(least, 1)

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    check_size("max_len", self.max_len)
    if self.block < 0:
      raise ValueError(f"attention.block is {self.block}; 0 (the root) or more tokens")
    if not 0 <= self.summary <= self.size:
      raise ValueError(
        f"attention.summary is {self.summary}; it counts tokens of a block of "
        f"{self.size}"
      )
    if self.prefix < 0:
      raise ValueError(
        f"attention.prefix is {self.prefix}; it counts tokens, 0 or more"
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
    return fixed_attention(
      q * self.head_width**-0.5,
      k,
      v,
      segment.real,
      block=self.size,
      columns=range(self.size - self.summary, self.size),
      prefix=self.prefix,
      drop=Dropout(self.dropout).drop(deterministic),
    )
