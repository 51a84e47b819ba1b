"""What memories that keep tokens in their order have in common."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.memory.base import MemoryModule
from cached_tx.ops.fifo import Fifo

SAME_LENGTH = ("off", "pytorch", "tensorflow")
STARTS = ("empty", "zeros")


class PastMemory(MemoryModule):
  """Its slots are a past: the oldest first, the last one directly before the segment.

  A subclass has the fields clamp, same_length and start, as `XLMemory` describes them,
  and says in `regions` which slots there are.
  """

  clamp = 0
  same_length = "off"
  start = "empty"

  @property
  def window(self) -> int:
    """Keys that a query sees, itself included; 0: all there are."""
    if self.same_length == "off":
      return 0
    slots = sum(count for _, count in self.regions)
    return slots + (self.same_length == "tensorflow")

  @property
  def farthest(self) -> int:
    """Largest distance of relative positions, for all that is farther too; 0: any."""
    return self.clamp

  @property
  def zeros(self) -> bool:
    """Whether the places before a document are zero tokens that are attended to."""
    return self.start == "zeros"

  @nn.nowrap
  def check_past(self) -> None:
    """Raises ValueError, naming the config key, for values that do not exist or fit."""
    if self.clamp < 0:
      raise ValueError(f"memory.clamp is {self.clamp}; a distance, or 0 (off)")
    for name, known in (("same_length", SAME_LENGTH), ("start", STARTS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"memory.{name} is {getattr(self, name)!r}; one of {', '.join(known)}"
        )
    if self.same_length != "off" and not self.window:
      raise ValueError(
        "memory.same_length is 'pytorch' and memory.size 0, with no other slots, so a "
        "query would see no key, not even its own: set memory.same_length to "
        "tensorflow or off"
      )

  @nn.nowrap
  def counted(self, queue: Fifo) -> Fifo:
    """Places that hold no token hold 0: a token, where zeros are attended to."""
    return queue._replace(valid=jnp.ones_like(queue.valid)) if self.zeros else queue
