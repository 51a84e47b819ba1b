"""Transformer-XL's memory: Dai et al., 2019, arXiv:1901.02860."""

from typing import NamedTuple

import flax.linen as nn

from cached_tx.memory.base import Slots, Update
from cached_tx.memory.past import PastMemory
from cached_tx.ops.fifo import Fifo, empty, push
from cached_tx.types import DType, Hidden, Mask


class XLState(NamedTuple):
  """The layer's last M inputs. Leaves lead with B."""

  recent: Fifo


class XLMemory(PastMemory):
  """Keeps the layer's last inputs as further keys of its attention.

  Attributes:
    size: M, any number; it may differ between training and evaluation.
    clamp: the largest distance of relative positions: keys that are farther count as
      if they were this far. The authors' clamp_len; 0 is off.
    same_length: off shows a query all M slots and the segment so far: between M + 1
      and M + C keys, by its place in the segment. The others show every query as many,
      so that no result depends on where segments end: pytorch the M newest, itself
      included, as the authors' PyTorch code, tensorflow M + 1, as their TensorFlow
      code, which the published numbers come from.
    start: what stands in the M places before a document. empty: nothing; the authors'
      PyTorch code, whose memory grows. zeros: zero tokens, whose keys and values are 0
      and which are attended to: their terms of position count, in the sum of the
      softmax too; the paper and the authors' TensorFlow code. A document that begins
      inside a segment has them as well, in place of the tokens before it. Differs from
      the paper in the default, which lets no weight go to tokens that never were.
  """

  size: int = 128
  clamp: int = 0
  same_length: str = "off"
  start: str = "empty"

  @property
  def regions(self) -> tuple[tuple[str, int], ...]:
    """The kept tokens."""
    return (("memory", self.size),)

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not exist or do not fit."""
    del segment, width, heads
    if self.size < 0:
      raise ValueError(f"memory.size is {self.size}; it counts tokens: 0 or more")
    self.check_past()

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> XLState:
    """A memory of nothing, or of zero tokens."""
    del heads
    return XLState(self.counted(empty(batch, self.size, width, dtype)))

  @nn.nowrap
  def slots(self, state: XLState) -> Slots:
    """The kept tokens."""
    return Slots(*state.recent)

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: XLState) -> Update:
    """Returns the memory after the segment `x`."""
    return Update(XLState(self.counted(push(state.recent, x, starts)[1])))
