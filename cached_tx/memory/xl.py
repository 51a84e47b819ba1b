"""Transformer-XL's memory: Dai et al., 2019, arXiv:1901.02860."""

from typing import NamedTuple

import flax.linen as nn

from cached_tx.memory.base import MemoryModule, Slots, Update
from cached_tx.ops.fifo import Fifo, empty, push
from cached_tx.types import DType, Hidden, Mask


class XLState(NamedTuple):
  """The layer's last M inputs. Leaves lead with B."""

  recent: Fifo


class XLMemory(MemoryModule):
  """Keeps the layer's last inputs as further keys of its attention.

  Memory starts empty. Differs from the paper, whose memory starts as zeros that
  are attended to.

  Attributes:
    size: M, any number; it may differ between training and evaluation.
  """

  size: int = 128

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError if the size is negative."""
    del segment, width, heads
    if self.size < 0:
      raise ValueError(f"memory.size is {self.size}; it counts tokens: 0 or more")

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> XLState:
    """An empty memory."""
    del heads
    return XLState(empty(batch, self.size, width, dtype))

  @nn.nowrap
  def slots(self, state: XLState) -> Slots:
    """The kept tokens."""
    return Slots(*state.recent)

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: XLState) -> Update:
    """Returns the memory after the segment `x`."""
    return Update(XLState(push(state.recent, x, starts)[1]))
