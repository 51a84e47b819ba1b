"""Windows, global and random blocks: Zaheer et al., 2020, arXiv:2007.14062."""

from functools import lru_cache

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import ToHeads
from cached_tx.ops import bigbird
from cached_tx.ops.banded import check_size
from cached_tx.types import DType, Heads, Hidden, Segment


class BigBirdAttention(nn.Module):
  """A block attends itself, its neighbours, both ends of the row and random blocks.

  Returns heads. See `bigbird_attention`, the paper's internal construction. A row is
  one document: `segment.starts` is not looked at. Its last block is that of its last
  real token. The graph is a function of `seed` and `layer`, the same in training and
  in evaluation, and that of a row does not depend on its padding.

  Attributes:
    heads: H; each has random blocks of its own.
    head_width: K; H K may differ from D.
    block: tokens of a block.
    random: random blocks that a block sees.
    seed: of the graph, with `layer`.
    layer: number of the layer, so that layers of one seed have graphs of their own.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  block: int = 64
  random: int = 3
  seed: int = 0
  layer: int = 0
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    check_size("attention.block", self.block)
    if self.random < 0:
      raise ValueError(
        f"attention.random is {self.random}; it counts blocks, 0 or more"
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
    blocks = -(-x.shape[1] // self.block)
    last = bigbird.last_blocks(segment.real, self.block)
    preferred = jnp.asarray(_priorities(self.seed, self.layer, self.heads, blocks))
    graph, drawn = bigbird.random_blocks(preferred, last, self.random)
    return bigbird.bigbird_attention(
      q * self.head_width**-0.5,
      k,
      v,
      segment.real,
      graph,
      drawn,
      last,
      block=self.block,
      drop=Dropout(self.dropout).drop(deterministic),
    )


@lru_cache(maxsize=64)
def _priorities(seed: int, layer: int, heads: int, blocks: int) -> np.ndarray:
  return bigbird.priorities(seed, layer, heads, blocks)
