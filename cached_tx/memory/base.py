"""What every memory is: a state, its start, its update."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

from cached_tx.types import DType, Losses, Memory, SlotMask, State


class Slots(NamedTuple):
  """What a memory offers to attention, oldest first.

  Attributes:
    values: tokens of the row's document, in the width of the layer's input; 0
      where not valid.
    valid: which of them exist.
  """

  values: Memory
  valid: SlotMask


class Comparison(NamedTuple):
  """How attention over two sets of slots is compared.

  Attributes:
    norm: of the difference; as of `size_of_gap`.
    scaled: whether the products of queries and keys are scaled by K ** -0.5.
    first: place in the segment of the first query that is asked.
    weight: factor of the loss.
  """

  norm: str = "l2"
  scaled: bool = True
  first: int = 0
  weight: float = 1.0


class Replaced(NamedTuple):
  """Tokens that left a memory, and the slots that took their place.

  A slot is valid only where all tokens that it is made of were. `new` carries
  gradients to the compressor alone.
  """

  old: Slots
  new: Slots
  how: Comparison = Comparison()


class Update(NamedTuple):
  """What an update returns.

  Attributes:
    state: the memory after the segment, of the type it had before.
    losses: auxiliary losses of the memory's own.
    replaced: set by memories that compress and want attention reconstructed.
  """

  state: State
  losses: Losses = {}  # noqa: RUF012 - never written to
  replaced: Replaced | None = None


def cleared(state: State) -> State:
  """The state with 0 in every place that holds nothing, whatever stands there.

  Layers begin with it: 0 x NaN is NaN, so masking a product is not enough. Types of
  states that have such places say which by a method `cleared` of their own.
  """
  speaks = lambda part: hasattr(part, "cleared")
  own = lambda part: part.cleared() if speaks(part) else part
  return jax.tree.map(own, state, is_leaf=speaks)


def partitioned(init: Any, *names: str | None) -> Any:
  """An initialiser of a parameter whose axes carry logical names, for sharding."""
  return nn.with_logical_partitioning(init, names)


class MemoryModule(nn.Module):
  """Base of all memories. A subclass is one file of this folder.

  Class attributes, to be overridden where they differ:
    reader: the kind of attention layer that reads this memory (layers/__init__.py).
    clocked: whether the state changes only every `segment` tokens of the row.
    min_tbptt: fewest segments that a gradient must span for every option to have its
      effect and every parameter to be trained.
    min_tbptt_reason: why, for the error message.
  """

  reader: ClassVar[str] = "slots"
  clocked: ClassVar[bool] = True

  @property
  def min_tbptt(self) -> int:
    """Fewest segments that a gradient must span; see the class."""
    return 1

  @property
  def min_tbptt_reason(self) -> str:
    """Why fewer are refused."""
    return ""

  @property
  def auxiliary(self) -> tuple[str, ...]:
    """Names of the submodules that an auxiliary loss alone trains."""
    return ()

  @property
  def reconstructs(self) -> bool:
    """Whether the attention layer adds a reconstruction loss for what was replaced."""
    return False

  @property
  def watches(self) -> bool:
    """Whether an update needs the attention that each key received from the segment."""
    return False

  @property
  def regions(self) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the parts of its slots that have an age, oldest first."""
    return ()

  @property
  def apart(self) -> int:
    """How many of the first slots have relative positions of their own."""
    return 0

  @property
  def window(self) -> int:
    """Keys that a query sees, itself included; 0: all there are."""
    return 0

  @property
  def farthest(self) -> int:
    """Largest distance of relative positions, for all that is farther too; 0: any."""
    return 0

  @property
  def zeros(self) -> bool:
    """Whether the M places before a document are zero tokens that are attended to."""
    return False

  @property
  def redraw(self) -> int:
    """Training steps between two draws of its random constants; 0: they stay."""
    return 0

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError where the memory does not fit the layer around it."""

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> State:
    """An empty memory for `batch` rows.

    Args:
      batch: B.
      width: D of the layer's input.
      heads: H of the layer.
      dtype: of stored tokens; what accumulates is float32 or wider.
    """
    raise TypeError(f"{type(self).__name__} defines no initial_state")

  @nn.nowrap
  def draw(
    self, layer: Array | int, width: int, heads: int, step: Array | int = 0
  ) -> Any:
    """Random constants of layer number `layer`: neither parameters nor state.

    Args:
      layer: its number in the model.
      width: D of the layer's input.
      heads: H of the layer.
      step: the training step that they are of, from 0; it may be traced. They change
        every `redraw` steps.
    """
    del layer, width, heads, step
    return None
