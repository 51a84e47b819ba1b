"""Attention with a memory of this library: a row is read as its segments, in order."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from cached_tx.layers.base import MemoryAttention
from cached_tx.memory import MemoryModule, build_memory
from cached_tx.ops.projections import constant
from cached_tx.types import DType, Heads, Hidden, Segment


class RecurrentAttention(nn.Module):
  """What a layer with a memory finds in a row, a segment after the other; heads.

  Causal: a token sees what its segment has up to it, and the memory of what came
  before (Transformer-XL, compressive, a gated cache of the row, running sums), which
  begins empty with every row. Time and memory are linear in L. A row is one document:
  `segment.starts` is not looked at.

  Attributes:
    heads: H.
    head_width: K; H K is D.
    memory: kind, and its options, as of `build_memory`. None: xl as it is by itself. An
      option that only a loss of the memory's own would train, or that needs the number
      of the step, is refused: a classifier has neither.
    segment: C, tokens between two updates of the memory.
    positions: rotary, relative (where the memory allows it) or none.
    seed: of random constants, where the memory has some and no seed of its own.
    layer: number of the layer, for the same.
    dropout: rate on the attention's weights, where it has some.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  memory: Mapping[str, Any] | None = None
  segment: int = 128
  positions: str = "rotary"
  seed: int = 0
  layer: int = 0
  dropout: float = 0.0
  dtype: DType = jnp.float32

  causal = True  # no field: the first token sees nothing of a row

  @nn.nowrap
  def _memory(self) -> MemoryModule:
    options = dict(self.memory or {"kind": "xl"})
    if "kind" not in options:
      raise ValueError("attention.memory has no kind: xl, compressive, grc or favor")
    memory = build_memory(section="attention.memory", **options)
    if hasattr(memory, "seed") and "seed" not in options:
      memory = memory.clone(seed=self.seed)
    if hasattr(memory, "dtype") and "dtype" not in options:
      memory = memory.clone(dtype=self.dtype)
    return memory

  @nn.nowrap
  def _layer(self, **options: Any) -> MemoryAttention:
    from cached_tx.layers import attention_for  # which needs this package's parent

    return attention_for(
      self._memory(),
      width=self.heads * self.head_width,
      heads=self.heads,
      segment=self.segment,
      positions=self.positions,
      dropout=self.dropout,
      dtype=self.dtype,
      **options,
    )

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    memory = self._layer(parent=None).memory
    if memory.auxiliary or memory.reconstructs:
      raise ValueError(
        "attention.memory has a compressor that a loss of its own trains, which a "
        "classifier has not: set attention.memory.loss to none"
      )
    if memory.redraw:
      raise ValueError(
        f"attention.memory.redraw is {memory.redraw}, but a classifier's rows of "
        "features stay as they are: set it to 0"
      )
    if memory.reader == "sums" and self.dropout:
      raise ValueError(
        f"model.attention_dropout is {self.dropout}, but running sums have no weights "
        "to drop: set it to 0"
      )

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding."""
    self.check()
    B, L, D = x.shape
    if self.heads * self.head_width != D:
      raise ValueError(
        f"heads have {self.heads * self.head_width} channels, but the input {D}: "
        "a memory keeps inputs as they are; set model.qkv to model.width, or to 0"
      )
    layer = self._layer(name="read")
    draw = constant(lambda: layer.draw(self.layer))
    state = layer.initial_state(B)
    if not layer.memory.clocked:
      whole = Segment(jnp.zeros((B, L), bool), segment.valid)
      heads, _, _ = layer.mix(x, state, whole, draw, deterministic)
      return heads
    # Real tokens first: then what follows them in the last segment is seen by none.
    order = back = None
    if segment.valid is not None:
      order = jnp.argsort(~segment.valid, axis=1, stable=True)
      back = jnp.argsort(order, axis=1)
      x = _picked(x, order)
    cuts = _cut(x, self.segment)
    starts: Bool[Array, "B C"] = jnp.zeros((B, self.segment), bool)

    def read(layer: Any, state: Any, tokens: Hidden) -> tuple[Any, Heads]:
      segment = Segment(starts)
      heads, state, _ = layer.mix(tokens, state, segment, draw, deterministic)
      return state, heads

    scan = nn.scan(
      read,
      variable_broadcast="params",
      split_rngs={"params": False, "dropout": True},
    )
    _, found = scan(layer, state, cuts)  # n B C H K
    found = jnp.moveaxis(found, 0, 1).reshape(B, -1, *found.shape[3:])[:, :L]
    return found if back is None else _picked(found, back)


def _cut(x: Hidden, size: int) -> jax.Array:
  """Pieces of a row, n B C D; the last is filled up with 0."""
  B, L, D = x.shape
  x = jnp.pad(x, ((0, 0), (0, -L % size), (0, 0)))
  return jnp.moveaxis(x.reshape(B, -1, size, D), 1, 0)


def _picked(x: jax.Array, places: jax.Array) -> jax.Array:
  """The tokens of each row that stand at these places."""
  return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), 1)
