"""Attention to learned mixtures of tokens: Wang et al., 2020, arXiv:2006.04768."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.attentions.checks import check_length
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import kernel_for
from cached_tx.layers.projections import ToHeads
from cached_tx.memory import partitioned
from cached_tx.ops.linformer import linformer_attention
from cached_tx.types import DType, Heads, Hidden, Segment

SHARE = ("key-value", "headwise")


class LinformerAttention(nn.Module):
  """Every token attends to `rank` learned mixtures of the row's tokens; returns heads.

  A row is one document: `segment.starts` is not looked at. Time and memory are linear
  in L. A padded token is no part of a mixture; places count from the row's first token.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    max_len: most tokens of a row; shorter ones use the first rows of the mixtures.
    rank: R, called k in the paper.
    share: key-value, one mixture for keys, values and all heads (E = F); headwise, E
      and F, for all heads.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  max_len: int
  rank: int = 16
  share: str = "key-value"
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    if self.rank < 1:
      raise ValueError(f"attention.rank is {self.rank}; it counts mixtures: 1 or more")
    if self.max_len < 1:
      raise ValueError(f"max_len is {self.max_len}; it counts tokens: 1 or more")
    if self.share not in SHARE:
      raise ValueError(f"attention.share is {self.share!r}; one of {', '.join(SHARE)}")

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding.

    Raises:
      ValueError: where the settings do not fit, or the row is too long.
    """
    self.check()
    L = x.shape[1]
    check_length(L, self.max_len)
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    init = partitioned(nn.initializers.xavier_uniform(), None, None)
    shape = self.max_len, self.rank
    e = f = self.param("mixture", init, shape, jnp.float32)[:L]
    if self.share == "headwise":
      f = self.param("value_mixture", init, shape, jnp.float32)[:L]
    return linformer_attention(
      q * self.head_width**-0.5,
      k,
      v,
      segment.real,
      e,
      f,
      drop=Dropout(self.dropout).drop(deterministic),
      kernel=kernel_for("auto", L),
    )
