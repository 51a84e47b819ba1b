"""Softmax attention over a memory's slots and the tokens of the segment."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cached_tx.layers import clock
from cached_tx.layers.analysis import ANALYSIS, Attended, asked
from cached_tx.layers.apart import ApartPositions
from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import check_attention, kernel_for
from cached_tx.layers.projections import ToHeads
from cached_tx.layers.reconstruction import reconstruction_loss
from cached_tx.memory import Slots, partitioned
from cached_tx.ops.attention import attention_weights, softmax_attention
from cached_tx.ops.blockwise import Relative, blockwise_attention
from cached_tx.ops.documents import document_ids, interval_before
from cached_tx.ops.positions import distance_scores, distance_table, rotate
from cached_tx.ops.sight import Sight, shown
from cached_tx.types import Heads, Hidden, Losses, Segment, State

Place = Int[Array, "#B Q"]
Bias = Float[Array, "H K"]


class _Projected(NamedTuple):
  """What attention is of, besides what hides keys.

  Attributes:
    q: scaled, with the bias u.
    relative: the terms by distance, with the bias v; None without them.
    bare: the scaled queries without biases.
  """

  q: Float[Array, "B Q H K"]
  k: Float[Array, "B S H K"]
  v: Float[Array, "B S H K"]
  relative: Relative | None
  bare: Float[Array, "B Q H K"]


class SlotAttention(MemoryAttention):
  """Attends jointly to slots and segment, as Transformer-XL does.

  Slots stand directly before the segment, the newest nearest. Positions depend on
  the distance between query and key alone. With rotary positions, queries and keys
  have biases (measured on the bundled text: 0.25 bits per byte better after 100,000
  tokens); with relative ones, u and v are the biases.

  Attributes:
    channels: K, of each head; 0: D / H.
    weight_dropout: rate on the attention's weights; None: that of the output.
    tied: u and v are no parameters of the layer, but come as `draw`: the authors'
      PyTorch code has one pair for all layers.
    norm: applied to queries, slots and tokens when they are read, so that the memory
      holds the layer's inputs before it. None: they are read as they come.
    attention: how whole segments attend: dense holds all scores of queries and keys;
      blocks holds those of a block, in memory that grows with the length alone; auto
      takes what is faster. It changes rounding, speed and memory, and no dropped
      weight. Streams, and `memory.tables` two, are dense whatever it is.
  """

  channels: int = 0
  weight_dropout: float | None = None
  tied: bool = False
  norm: nn.LayerNorm | None = None
  attention: str = "auto"

  @property
  def head_width(self) -> int:
    """K."""
    return self.channels or self.width // self.heads

  @nn.nowrap
  def check_heads(self) -> None:
    """Raises ValueError if the heads do not fit the width."""
    if self.channels < 0:
      raise ValueError(
        f"model.head_width is {self.channels}; it counts channels, or is 0 (D / H)"
      )
    if not self.channels:
      super().check_heads()

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the config key, where the settings do not fit."""
    super().check()
    memory, positions = self.memory, self.positions
    check_attention(self.attention)
    if memory.apart and self.attention == "blocks":
      raise ValueError(
        "model.attention is 'blocks', which has one table of relative positions, but "
        "memory.tables is 'two': set one of them to another value"
      )
    if memory.apart and positions != "relative":
      raise ValueError(
        "memory.tables is 'two', tables of relative positions, but model.positions is "
        f"{positions!r}: set memory.tables to one, or model.positions to relative"
      )
    if memory.watches and self.tied:
      raise ValueError(
        "memory.compressor is 'most_used', which asks the layer for its own attention "
        "again, but model.tied_biases keeps its biases elsewhere: set it to False"
      )
    if memory.farthest and positions != "relative":
      raise ValueError(
        f"memory.clamp is {memory.farthest}, a distance of relative positions, but "
        f"model.positions is {positions!r}: set memory.clamp to 0, or model.positions "
        "to relative"
      )
    if memory.zeros and positions == "rotary":
      raise ValueError(
        "memory.start is 'zeros', but with model.positions 'rotary' keys have biases, "
        "so that a token of zeros is not a key of zeros: set memory.start to empty, or "
        "model.positions to relative or none"
      )
    if self.tied and positions != "relative":
      raise ValueError(
        "model.tied_biases is for the biases u and v of relative positions, but "
        f"model.positions is {positions!r}"
      )
    if self.norm is not None and memory.reconstructs:
      raise ValueError(
        "model.norm is 'pre_raw', but memory.loss reconstructs the attention over "
        "normed inputs: set model.norm to pre or post"
      )
    if memory.zeros and getattr(self.norm, "use_bias", False):
      raise ValueError(
        "memory.start is 'zeros', but model.norm 'pre_raw' with model.norm_bias adds a "
        "bias to a token of zeros: set memory.start to empty, or model.norm to post"
      )

  def setup(self) -> None:
    """Makes the projections."""
    heads = (self.heads, self.head_width)
    bias = 1.0 if self.positions == "rotary" else None
    self.query = ToHeads(*heads, self.dtype, bias)
    self.key = ToHeads(*heads, self.dtype, bias)
    self.value = ToHeads(*heads, self.dtype)
    rate = self.dropout if self.weight_dropout is None else self.weight_dropout
    self.drop = Dropout(rate)
    if self.positions == "relative":
      self.distance = ToHeads(*heads, self.dtype)
    if self.positions == "relative" and not self.tied:
      init = partitioned(nn.initializers.zeros, "heads", "head_width")
      self.content_bias = self.param("content_bias", init, heads, jnp.float32)  # u
      self.distance_bias = self.param("distance_bias", init, heads, jnp.float32)  # v
    if self.memory.apart:
      self.apart = ApartPositions(
        self.memory.apart, self.segment, *heads, self.memory.farthest, self.dtype
      )

  @nn.nowrap
  def mix(
    self, x: Hidden, state: State, segment: Segment, draw: Any, deterministic: bool
  ) -> tuple[Heads, State, Losses]:
    """Attends; returns heads before the output projection."""
    if self.tied and draw is None:
      raise ValueError("a layer with tied biases takes them as draw = (u, v)")
    shared = tuple(draw) if self.tied else ()
    return clock.run(self, x, state, segment, deterministic, shared)

  def read(
    self,
    queries: Hidden,
    index: Place | None,
    tokens: Float[Array, "B C D"],
    starts: Bool[Array, "B C"],
    memory: State,
    deterministic: bool,
    *biases: Bias,
  ) -> Heads:
    """Attends from the queries to the slots and to the tokens up to their own."""
    if index is None and not self.memory.apart and not asked(self):
      return self._whole(tokens, starts, memory, deterministic, *biases)
    terms = self._terms(queries, index, tokens, starts, memory, *biases)
    q, k, v, mask, scores, zeros = terms
    if asked(self):
      self.sow(ANALYSIS, "attended", self._attended(terms, starts, memory))
    drop = self.drop.function(deterministic)
    return softmax_attention(q, k, v, mask, scores, drop, zeros)

  def _whole(
    self,
    tokens: Float[Array, "B C D"],
    starts: Bool[Array, "B C"],
    memory: State,
    deterministic: bool,
    *biases: Bias,
  ) -> Heads:
    """`read` of all tokens of the segment."""
    slots = self.memory.slots(memory)
    own = self._projected(tokens, None, tokens, slots, *biases)
    return blockwise_attention(
      own.q,
      own.k,
      own.v,
      self._sight(None, starts, slots),
      window=self.memory.window,
      relative=own.relative,
      drop=self.drop.drop(deterministic),
      kernel=kernel_for(self.attention, tokens.shape[1]),
    )

  def _sight(
    self, index: Place | None, starts: Bool[Array, "B C"], slots: Slots | None
  ) -> Sight:
    """What the queries at `index` (None: all, in order) see of slots and tokens."""
    queries = keys = document_ids(starts)
    places = valid = zeros = None
    M = 0
    if slots is not None:
      M = slots.values.shape[1]
      keys = jnp.pad(keys, ((0, 0), (M, 0)))
      valid = jnp.pad(slots.valid, ((0, 0), (0, starts.shape[1])), constant_values=True)
      if self.memory.zeros:
        zeros = interval_before(starts, M)
    if index is not None:
      of = lambda x: jnp.take_along_axis(x, index, axis=1)
      queries, places = of(queries), M + index
      if zeros is not None:
        zeros = jax.vmap(of, in_axes=2, out_axes=2)(zeros)
    return Sight(queries, keys, valid, places, zeros=zeros)

  def _projected(
    self,
    queries: Hidden,
    index: Place | None,
    tokens: Float[Array, "B C D"],
    slots: Slots | None,
    content_bias: Bias | None = None,
    distance_bias: Bias | None = None,
  ) -> _Projected:
    """Queries, standing at `index` (None: in order), and keys and values."""
    context, M = tokens.astype(self.dtype), 0
    if slots is not None:
      M = slots.values.shape[1]
      context = jnp.concatenate([slots.values.astype(self.dtype), context], axis=1)
    if self.norm is not None:
      queries, context = self.norm(queries), self.norm(context)
    q = self.query(queries) * self.head_width**-0.5
    k, v = self.key(context), self.value(context)
    if self.positions == "rotary":
      if index is None:
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      q = rotate(q, M + index)
      k = rotate(k, jnp.arange(k.shape[1], dtype=jnp.int32)[None])
    if self.positions != "relative":
      return _Projected(q, k, v, None, q)
    u = self.content_bias if content_bias is None else content_bias
    v_bias = self.distance_bias if distance_bias is None else distance_bias
    biased = lambda bias: q + (bias * self.head_width**-0.5).astype(q.dtype)[None, None]
    keys = k.shape[1] - self.memory.apart
    table = distance_table(keys, self.width, self.memory.farthest)
    relative = Relative(biased(v_bias), self.distance(table[None])[0])
    return _Projected(biased(u), k, v, relative, q)

  def _terms(
    self,
    queries: Hidden,
    index: Place | None,
    tokens: Float[Array, "B C D"],
    starts: Bool[Array, "B C"],
    memory: State,
    *biases: Bias,
  ) -> tuple[Any, ...]:
    """What attention is of: queries, keys, values, a mask, terms of position, zeros."""
    slots = self.memory.slots(memory)
    own = self._projected(queries, index, tokens, slots, *biases)
    sight, keys = self._sight(index, starts, slots), own.k.shape[1]
    mask, zeros = shown(sight, own.q.shape[1], keys, window=self.memory.window)
    scores, whole = None, index is None
    if own.relative is not None:
      if index is None:
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      far = self.memory.apart
      place = None if whole else keys - tokens.shape[1] - far + index
      scores = distance_scores(*own.relative, place, own.k.shape[1] - far)
      if far:
        apart = self.apart(own.bare, index, self.width)
        scores = jnp.concatenate([apart, scores], axis=3)
    return own.q, own.k, own.v, mask, scores, zeros

  def fold(
    self, tokens: Float[Array, "B C D"], starts: Bool[Array, "B C"], memory: State
  ) -> tuple[State, Losses]:
    """The memory after the segment, and the losses of what it replaced."""
    watched: tuple[Any, ...] = ()
    if self.memory.watches:
      watched = (self.received(tokens, starts, memory),)
    update = self.memory(tokens, starts, memory, *watched)
    losses = dict(update.losses)
    if update.replaced is not None:
      losses["reconstruction"] = reconstruction_loss(
        self.query, self.key, self.value, tokens, starts, update.replaced
      )
    if losses and asked(self):
      self.sow(ANALYSIS, "losses", losses)
    return update.state, losses

  def received(
    self, tokens: Float[Array, "B C D"], starts: Bool[Array, "B C"], memory: State
  ) -> Float[Array, "B S"]:
    """Weights, without dropout, of every slot and token: mean of heads and queries.

    Asked of the whole segment at once, so that no cutting into calls changes it. No
    gradient flows.
    """
    return _received(self._terms(tokens, None, tokens, starts, memory))

  @nn.nowrap
  def regions(self) -> tuple[tuple[str, int], ...]:
    """Those of the memory, then the segment itself."""
    return (*self.memory.regions, ("sequence", self.segment))

  @nn.nowrap
  def _attended(
    self, terms: tuple[Any, ...], starts: Bool[Array, "B C"], memory: State
  ) -> Attended:
    received = _received(terms)
    *_, mask, _, zeros = terms
    mask = mask if zeros is None else mask & ~zeros
    slots = self.memory.slots(memory)
    full = ~starts.any(axis=1)
    if slots is not None:
      full = full & slots.valid.all(axis=1)
    return Attended(received, mask.mean(axis=1), full)


def _received(terms: tuple[Any, ...]) -> Float[Array, "B S"]:
  """What keys get of the queries' weights, in the mean; no gradient flows."""
  q, k, _, mask, scores, zeros = jax.lax.stop_gradient(terms)
  return attention_weights(q, k, mask, scores, zeros).mean(axis=(1, 2))
