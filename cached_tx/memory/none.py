"""No memory: attention within the segment alone."""

from typing import NamedTuple

import flax.linen as nn

from cached_tx.memory.base import MemoryModule, Update
from cached_tx.types import DType, Hidden, Mask


class NoState(NamedTuple):
  """Nothing. A pytree without leaves."""


class NoMemory(MemoryModule):
  """The baseline: a Transformer that forgets at every `segment`-th token."""

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> NoState:
    """An empty memory, which stays empty."""
    del batch, width, heads, dtype
    return NoState()

  @nn.nowrap
  def slots(self, state: NoState) -> None:
    """Nothing to attend to."""
    del state

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: NoState) -> Update:
    """Returns the state as it was."""
    del x, starts
    return Update(state)
