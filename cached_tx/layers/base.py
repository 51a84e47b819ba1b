"""What every attention layer that owns a memory has in common."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from cached_tx.layers.clock import open_stream
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.projections import FromHeads
from cached_tx.memory import MemoryModule
from cached_tx.ops.positions import POSITIONS
from cached_tx.types import DType, Heads, Hidden, Losses, Segment, State


class MemoryAttention(nn.Module):
  """An attention layer as a function of state: y, state = f(x, state).

  A subclass gives `mix`, which returns heads.

  Attributes:
    width: D.
    heads: H; divides the width.
    memory: what the layer remembers.
    segment: C, tokens of the row between two updates of the memory.
    positions: rotary, relative (Transformer-XL) or none.
    dropout: rate on the attention's weights and on the output.
    output_scale: variance of the output's kernel, relative to 1 / fan-in.
    dtype: of the computation. Parameters are float32.
  """

  width: int
  heads: int
  memory: MemoryModule
  segment: int
  positions: str = "rotary"
  dropout: float = 0.0
  output_scale: float = 1.0
  dtype: DType = jnp.float32

  @property
  def head_width(self) -> int:
    """K."""
    return self.width // self.heads

  @nn.nowrap
  def check_heads(self) -> None:
    """Raises ValueError if the heads do not divide the width."""
    if self.width % self.heads:
      raise ValueError(
        f"model.heads is {self.heads}, which does not divide model.width {self.width}"
      )

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the config key, where the settings do not fit."""
    self.check_heads()
    if self.positions not in POSITIONS:
      raise ValueError(
        f"model.positions is {self.positions!r}; one of {', '.join(POSITIONS)}"
      )
    if self.positions == "rotary" and self.head_width % 2:
      raise ValueError(
        f"rotary positions turn pairs of channels, but a head has {self.head_width}: "
        "change model.width, model.heads or model.positions"
      )
    if self.segment < 1:
      raise ValueError(f"segment is {self.segment}; it counts tokens: 1 or more")
    self.memory.check(self.segment, self.width, self.heads)

  @nn.nowrap
  def initial_state(self, batch: int) -> State:
    """The empty memory of `batch` rows, at the boundary of a segment."""
    self.check()
    return self.empty(batch)

  @nn.nowrap
  def empty(self, batch: int) -> State:
    """The layer's own memory, of nothing."""
    return self.memory.initial_state(batch, self.width, self.heads, self.dtype)

  @nn.nowrap
  def open_stream(self, state: State, batch: int) -> State:
    """The state that takes any number of tokens, from one at a boundary."""
    if not self.memory.clocked:
      return state
    return open_stream(state, batch, self.segment, self.width, self.dtype)

  @nn.nowrap
  def draw(self, layer: Array | int, step: Array | int = 0) -> Any:
    """Random constants of layer number `layer`, if the memory has any.

    `step` is the training step that they are of, from 0, and may be traced.
    """
    return self.memory.draw(layer, self.width, self.heads, step)

  @nn.nowrap
  def slots(self) -> int | None:
    """Memory slots that a token attends; None where running sums take their place."""
    if not hasattr(self.memory, "slots"):
      return None
    found = jax.eval_shape(lambda: self.memory.slots(self.initial_state(1)))
    return 0 if found is None else found.values.shape[1]

  @nn.nowrap
  def regions(self) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the parts of its keys, oldest first; () without weights."""
    return ()

  @nn.nowrap
  def gauges(self, params: Any) -> dict[str, Array]:
    """What its parameters say at a glance, by name: numbers per head (... H)."""
    del params
    return {}

  def mix(
    self, x: Hidden, state: State, segment: Segment, draw: Any, deterministic: bool
  ) -> tuple[Heads, State, Losses]:
    """Attends; returns heads before the output projection."""
    raise TypeError(f"{type(self).__name__} defines no mix")

  @nn.compact
  def __call__(
    self,
    x: Hidden,
    state: State,
    segment: Segment,
    *,
    draw: Any = None,
    deterministic: bool = True,
  ) -> tuple[Hidden, State, Losses]:
    """Attends, and remembers.

    Args:
      x: the layer's input, any float dtype.
      state: from `initial_state` (one whole segment of C real tokens a call), from
        `open_stream` (any number of tokens, padding anywhere), or from a former call.
      segment: document starts and padding of the tokens.
      draw: from `draw(layer, step)`, if the memory has random constants, None drawing
        those of layer 0 in step 0; or the biases (u, v) that a layer shares with
        others, each H K.
      deterministic: False turns dropout on; needs the rng "dropout".

    Returns:
      The output, 0 at padding; the state afterwards, of the type it had; auxiliary
      losses, summed over the segments that each row finished in this call.

    Raises:
      ValueError: where the settings do not fit, or the tokens do not fit the state.
    """
    self.check()
    heads, state, losses = self.mix(x, state, segment, draw, deterministic)
    y = FromHeads(self.width, self.output_scale, self.dtype, name="output")(heads)
    y = Dropout(self.dropout)(y, deterministic=deterministic)
    return y, state, losses
