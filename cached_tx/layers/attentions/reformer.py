"""Attention by locality-sensitive hashing: Kitaev et al., 2020, arXiv:2001.04451."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.banded import check_size
from cached_tx.ops.lsh import Rotations, hashed, lsh_attention, rotations, usual_buckets
from cached_tx.ops.projections import seeded
from cached_tx.types import DType, Heads, Hidden, Segment


class ReformerAttention(nn.Module):
  """Every token attends to those of its bucket that are sorted near it; returns heads.

  See `lsh_attention`. Queries are keys too. A row is one document: `segment.starts` is
  not looked at. Time is that of sorting, memory is linear in L. A padded token is in no
  bucket, and a row of l tokens has 2 l / chunk buckets whatever its padding.

  The rotations are a function of `seed`, `layer` and the shapes of heads: neither
  parameters nor state. Layers that `nn.scan` makes of one have the same.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    hashes: rounds of hashing.
    chunk: tokens of a chunk, m in the paper.
    buckets: how many, an even number; above 128 there may be more (`hashed`). None:
      2 l / chunk of a row of l tokens (section 2).
    following: whether a token sees its bucket in the chunk after its own too, not only
      in its own and the one before (the paper).
    seed: of the rotations, with `layer`.
    layer: number of the layer, so that layers of one seed have rotations of their own.
    bias: whether queries and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  hashes: int = 1
  chunk: int = 64
  buckets: int | None = None
  following: bool = False
  seed: int = 0
  layer: int = 0
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    for name in ("hashes", "chunk"):
      check_size(f"attention.{name}", getattr(self, name))
    if self.buckets is not None and (self.buckets < 2 or self.buckets % 2):
      raise ValueError(
        f"attention.buckets is {self.buckets}; there are two for each direction of a "
        "rotation: an even number, 2 or more"
      )

  @nn.nowrap
  def draw(self, tokens: int) -> Rotations:
    """The rotations for rows of up to so many tokens, float32."""
    most = self.buckets or 2 * max(-(-tokens // self.chunk), 1)
    key = jax.random.fold_in(seeded(self.seed), self.layer)
    return rotations(key, most, self.hashes, self.heads, self.head_width)

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K, 0 at padding. `x` is 0 there.

    Raises:
      ValueError: where the settings do not fit.
    """
    self.check()
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name: ToHeads(*options, name=name)(x)
    q, v, valid = project("query"), project("value"), segment.real
    count = usual_buckets(valid.sum(axis=1, dtype=jnp.int32), self.chunk)
    if self.buckets is not None:
      count = jnp.full_like(count, self.buckets)
    return lsh_attention(
      q * self.head_width**-0.5,
      v,
      valid,
      hashed(q, self.draw(x.shape[1]), count),
      chunk=self.chunk,
      following=self.following,
      drop=Dropout(self.dropout).drop(deterministic),
    )
