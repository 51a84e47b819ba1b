"""Windows and global tokens: Beltagy et al., 2020, arXiv:2004.05150."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads
from cached_tx.ops.banded import (
  Keys,
  block_attention,
  check_size,
  cleared,
  window_attention,
)
from cached_tx.types import DType, Heads, Hidden, Segment


class LongformerAttention(nn.Module):
  """A token attends those around it and the global ones, which attend all; heads.

  Global tokens are the first of the row. They have queries, keys and values of their
  own where they attend all (section 3.1); other tokens score them as any other key. A
  row is one document: `segment.starts` is not looked at. Time and memory are linear in
  L.

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    window: tokens that a token sees, itself included; of an even number, one more after
      it than before.
    global_tokens: how many there are; of 0, there are no parameters for them.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  window: int = 512
  global_tokens: int = 1
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    check_size("attention.window", self.window)
    if self.global_tokens < 0:
      raise ValueError(
        f"attention.global_tokens is {self.global_tokens}; it counts tokens, 0 or more"
      )

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding."""
    self.check()
    bias = 0.0 if self.bias else None
    options = self.heads, self.head_width, self.dtype, bias, True
    project = lambda name, x=x: ToHeads(*options, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    drop, scale = Dropout(self.dropout).drop(deterministic), self.head_width**-0.5
    before = (self.window - 1) // 2
    first = min(self.global_tokens, x.shape[1])
    of_windows = drop and drop._replace(key=jax.random.fold_in(drop.key, 1))
    out = window_attention(
      q * scale,
      k,
      v,
      segment.real,
      before=before,
      after=self.window - 1 - before,
      everywhere=first,
      drop=of_windows,
    )
    if not first:
      return out
    own = project("global_query", x[:, :first])
    k, v = project("global_key"), project("global_value")
    real = segment.real
    keys = Keys(cleared(k, real), cleared(v, real), real[:, None, None, None])
    begin = block_attention((own * scale)[:, None], [keys], drop)[:, 0]
    return jnp.concatenate([begin, out[:, first:]], axis=1)
