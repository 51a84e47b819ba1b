"""Transformer-XL's memory: Dai et al., 2019, arXiv:1901.02860."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.memory.base import MemoryModule, Slots, Update
from cached_tx.ops.fifo import Fifo, empty, push
from cached_tx.types import DType, Hidden, Mask

SAME_LENGTH = ("off", "pytorch", "tensorflow")
STARTS = ("empty", "zeros")


class XLState(NamedTuple):
  """The layer's last M inputs. Leaves lead with B."""

  recent: Fifo


class XLMemory(MemoryModule):
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

  @property
  def window(self) -> int:
    """Keys that a query sees, itself included; 0: all there are."""
    if self.same_length == "off":
      return 0
    return self.size + (self.same_length == "tensorflow")

  @property
  def farthest(self) -> int:
    """Largest distance of relative positions, for all that is farther too; 0: any."""
    return self.clamp

  @property
  def zeros(self) -> bool:
    """Whether the M places before a document are zero tokens that are attended to."""
    return self.start == "zeros"

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not exist or do not fit."""
    del segment, width, heads
    if self.size < 0:
      raise ValueError(f"memory.size is {self.size}; it counts tokens: 0 or more")
    if self.clamp < 0:
      raise ValueError(f"memory.clamp is {self.clamp}; a distance, or 0 (off)")
    if self.same_length not in SAME_LENGTH:
      raise ValueError(
        f"memory.same_length is {self.same_length!r}; one of {', '.join(SAME_LENGTH)}"
      )
    if self.start not in STARTS:
      raise ValueError(f"memory.start is {self.start!r}; one of {', '.join(STARTS)}")
    if self.same_length == "pytorch" and not self.size:
      raise ValueError(
        "memory.same_length is 'pytorch' and memory.size 0, so a query would see no "
        "key, not even its own: set memory.same_length to tensorflow or off"
      )

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> XLState:
    """A memory of nothing, or of zero tokens."""
    del heads
    return XLState(self._counted(empty(batch, self.size, width, dtype)))

  @nn.nowrap
  def slots(self, state: XLState) -> Slots:
    """The kept tokens."""
    return Slots(*state.recent)

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: XLState) -> Update:
    """Returns the memory after the segment `x`."""
    return Update(XLState(self._counted(push(state.recent, x, starts)[1])))

  @nn.nowrap
  def _counted(self, queue: Fifo) -> Fifo:
    """Places that hold no token hold 0: a token, where zeros are attended to."""
    return queue._replace(valid=jnp.ones_like(queue.valid)) if self.zeros else queue
