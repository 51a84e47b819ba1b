"""Attention to softly sorted blocks: Tay et al., 2020, arXiv:2002.11296."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.attentions.checks import check_length
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads, kernel_init
from cached_tx.ops.banded import check_size
from cached_tx.ops.sinkhorn import COMBINE, block_sums, sinkhorn_attention
from cached_tx.types import DType, Heads, Hidden, Segment


class SinkhornAttention(nn.Module):
  """Every token attends to its block and to the block sorted to it; returns heads.

  See `sinkhorn_attention`. The sorting network is one linear map, the same for all
  heads, of the sum of a block's keys; it is computed in float32 at least. Differs from
  the paper: no noise is added to its scores in training. A row is one document:
  `segment.starts` is not looked at. Nothing is of L x L: memory is linear in L, but for
  the (L / block)^2 numbers of a permutation. A padded token is no part of a block, a
  block of padding none of the permutation.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    max_len: most tokens of a row; the sorting network knows their blocks.
    block: tokens of a block.
    iterations: of Sinkhorn's normalisation.
    temperature: of the permutation; near 0 it is hard.
    combine: joint, one softmax over both blocks; or sum, a softmax over each, added.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  max_len: int
  block: int = 50
  iterations: int = 7
  temperature: float = 0.75
  combine: str = "joint"
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    for name in ("max_len", "block", "iterations"):
      check_size(f"attention.{name}", getattr(self, name))
    if self.temperature <= 0:
      raise ValueError(
        f"attention.temperature is {self.temperature}; it must be above 0"
      )
    if self.combine not in COMBINE:
      raise ValueError(
        f"attention.combine is {self.combine!r}; one of {', '.join(COMBINE)}"
      )

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding.

    Raises:
      ValueError: where the settings do not fit, or the row is too long.
    """
    self.check()
    check_length(x.shape[1], self.max_len)
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    init = kernel_init(1.0, 1, ("head_width", None))
    shape = self.head_width, -(-self.max_len // self.block)
    kernel = self.param("sort", init, shape, jnp.float32)
    sums = block_sums(k, segment.real, self.block)  # B N H K
    own = kernel[:, : sums.shape[1]].astype(sums.dtype)
    return sinkhorn_attention(
      q * self.head_width**-0.5,
      k,
      v,
      segment.real,
      jnp.einsum("bnhk,kl->bhnl", sums, own),
      block=self.block,
      iterations=self.iterations,
      temperature=self.temperature,
      combine=self.combine,
      drop=Dropout(self.dropout).drop(deterministic),
    )
