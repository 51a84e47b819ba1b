"""An attention and a gated cache beside it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cached_tx.layers import clock
from cached_tx.layers.analysis import ANALYSIS, Blended, asked
from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import check_attention, kernel_for
from cached_tx.layers.projections import ToHeads
from cached_tx.layers.slots import SlotAttention
from cached_tx.memory import NoMemory, XLMemory, partitioned
from cached_tx.ops.blockwise import blockwise_attention
from cached_tx.ops.documents import document_ids
from cached_tx.ops.sight import Sight
from cached_tx.types import Heads, Hidden, Losses, Segment, State


class GatedState(NamedTuple):
  """The state of the cache and of the attention that it stands beside."""

  cache: State
  inner: State


class GatedAttention(MemoryAttention):
  """Blends, head by head, an attention and one over a cache (equations 1 to 3).

  o = sigmoid(lambda) o_mem + (1 - sigmoid(lambda)) o_self, lambda starting at 0.
  A token whose document has left nothing in the cache yet gets o_self alone. The
  cache has D_m channels; o_mem fills the first D_m / H channels of every head. Where
  the memory summarises attention, it is o_self before the output projection.

  Attributes:
    inner: gives o_self; another attention layer, of the same width, heads and
      segment. None: attention within the segment and, where `memory.inner` asks for
      them, over so many tokens before it.
    attention: of whole segments, auto, dense or blocks, as of `SlotAttention`; an
      inner attention that was given has its own.
  """

  inner: MemoryAttention | None = None
  attention: str = "auto"

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the config key, where the settings do not fit."""
    super().check()
    if self.memory.cache != "stream":
      raise ValueError(
        f"memory.cache is {self.memory.cache!r}: one cache for all rows, updated "
        "before it is read, shows a causal model other rows and later tokens; set "
        "memory.cache to stream, or use the layer in a GatedEncoderAttention"
      )
    if self.inner is not None and self.memory.inner:
      raise ValueError(
        f"memory.inner is {self.memory.inner}, but the layer was given an inner "
        "attention, which has a memory of its own: set memory.inner to 0"
      )
    check_attention(self.attention)
    inner = self._inner()
    inner.check()
    for name in ("width", "heads", "head_width", "segment", "positions"):
      own, other = getattr(self, name), getattr(inner, name)
      if own != other:
        raise ValueError(
          f"the inner attention has {name} {other!r}, and the layer {own!r}: they must "
          "be equal, for their heads are blended and it alone reads positions"
        )

  @nn.nowrap
  def _inner(self) -> MemoryAttention:
    if self.inner is not None:
      return self.inner
    tokens = self.memory.inner
    return SlotAttention(
      width=self.width,
      heads=self.heads,
      memory=XLMemory(size=tokens, parent=None) if tokens else NoMemory(parent=None),
      segment=self.segment,
      positions=self.positions,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      parent=None,
    )

  @nn.nowrap
  def draw(self, layer: Array | int, step: Array | int = 0) -> Any:
    """Random constants of the attention beside the cache, which has none."""
    return self._inner().draw(layer, step)

  def setup(self) -> None:
    """Makes the projections of the memory branch."""
    self.drop = Dropout(self.dropout)
    heads = (self.heads, self.memory.channels(self.width) // self.heads)
    self.memory_query = ToHeads(*heads, self.dtype)
    self.memory_key = ToHeads(*heads, self.dtype)
    self.memory_value = ToHeads(*heads, self.dtype)
    start = nn.initializers.constant(self.memory.lambda_start)
    init = partitioned(start, "heads")
    self.gate = self.param("gate", init, (self.heads,), jnp.float32)  # lambda
    self.own = self._inner()

  @nn.nowrap
  def initial_state(self, batch: int) -> GatedState:
    """The empty memory of `batch` rows, at the boundary of a segment."""
    return GatedState(super().initial_state(batch), self._inner().initial_state(batch))

  @nn.nowrap
  def open_stream(self, state: GatedState, batch: int) -> GatedState:
    """The state that takes any number of tokens, from one at a boundary."""
    width = self.width
    if self._summarises_attention:
      width = 2 * self.memory.channels(width)
    return GatedState(
      clock.open_stream(state.cache, batch, self.segment, width, self.dtype),
      self._inner().open_stream(state.inner, batch),
    )

  @property
  def _summarises_attention(self) -> bool:
    return self.memory.summary == "attention"

  @nn.nowrap
  def slots(self) -> int | None:
    """Those of the cache and of the attention beside it."""
    inner = self._inner().slots()
    return None if inner is None else self.memory.size + inner

  @nn.nowrap
  def regions(self) -> tuple[tuple[str, int], ...]:
    """Those of the attention beside the cache, whose slots have no age."""
    return self._inner().regions()

  @nn.nowrap
  def gauges(self, params: Any) -> dict[str, Array]:
    """sigmoid(lambda), the share of the cache in each head."""
    return {"gate": nn.sigmoid(params["gate"])}

  @nn.nowrap
  def mix(
    self,
    x: Hidden,
    state: GatedState,
    segment: Segment,
    draw: Any,
    deterministic: bool,
  ) -> tuple[Heads, GatedState, Losses]:
    """Attends; returns heads before the output projection."""
    own, inner, losses = self.own.mix(x, state.inner, segment, draw, deterministic)
    seen = self._seen(x, own)
    found, cache, more = clock.run(self, seen, state.cache, segment, deterministic)
    found, gate = found
    pad = own.shape[-1] - found.shape[-1]
    found = jnp.pad(found, ((0, 0), (0, 0), (0, 0), (0, pad)))
    heads = gate[..., None] * found + (1 - gate[..., None]) * own
    return heads, GatedState(cache, inner), losses | more

  @nn.nowrap
  def _seen(self, x: Hidden, own: Heads) -> Float[Array, "B L E"]:
    """What the cache's clock sees of a token: first the query, last what is summarised.

    The layer's input serves as both; else D_m channels of it and D_m of o_self.
    """
    if not self._summarises_attention:
      return x
    width = self.memory.channels(self.width)
    flat = own.reshape(*own.shape[:2], -1)[..., :width]
    return jnp.concatenate([x[..., :width].astype(flat.dtype), flat], axis=-1)

  def read(
    self,
    queries: Hidden,
    index: Int[Array, "#B Q"] | None,
    tokens: Float[Array, "B C D"],
    starts: Bool[Array, "B C"],
    memory: State,
    deterministic: bool,
  ) -> tuple[Heads, Float[Array, "B L H"]]:
    """What each query finds in the cache, and how much of it to take."""
    del tokens
    documents = document_ids(starts)
    if index is not None:
      documents = jnp.take_along_axis(documents, index, axis=1)
    slots = self.memory.slots(memory)
    values = slots.values.astype(self.dtype)
    width = values.shape[-1]
    q = self.memory_query(queries[..., :width])
    found = blockwise_attention(
      q * q.shape[-1] ** -0.5,
      self.memory_key(values),
      self.memory_value(values),
      Sight(key_valid=slots.valid),
      causal=False,
      offset=0,
      drop=self.drop.drop(deterministic),
      kernel=kernel_for(self.attention if index is None else "dense", q.shape[1]),
    )
    seen = slots.valid.any(axis=1)[:, None] & (documents == 0)  # B L
    gate = jnp.where(seen[..., None], nn.sigmoid(self.gate)[None, None], 0)
    if asked(self):
      blended = Blended(gate.mean(axis=(1, 2)), seen.all(axis=1))
      self.sow(ANALYSIS, "blended", blended)
    return found, gate.astype(self.dtype)

  def fold(
    self, tokens: Float[Array, "B C D"], starts: Bool[Array, "B C"], memory: State
  ) -> tuple[State, Losses]:
    """The cache after the segment."""
    if self._summarises_attention:
      tokens = tokens[..., self.memory.channels(self.width) :]
    update = self.memory(tokens, starts, memory)
    return update.state, dict(update.losses)
