"""Softmax attention over a memory's slots and the tokens of the segment."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cached_tx.layers import clock
from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.projections import ToHeads
from cached_tx.memory import Replaced, partitioned
from cached_tx.ops.attention import softmax_attention
from cached_tx.ops.documents import causal_mask, document_ids, places_before
from cached_tx.ops.positions import by_key, rotate, sinusoids
from cached_tx.types import Heads, Hidden, Losses, Mask, PerRow, Segment, State

Place = Int[Array, "#B Q"]
Bias = Float[Array, "H K"]


def _distances(place: Place, keys: int) -> Int[Array, "#B Q S"]:
  """From each of the S = `keys` columns to each query's; negative for later keys."""
  return place[:, :, None] - jnp.arange(keys, dtype=jnp.int32)[None, None]


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
  """

  channels: int = 0
  weight_dropout: float | None = None
  tied: bool = False
  norm: nn.LayerNorm | None = None

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
    self.drop = nn.Dropout(self._rate)
    if self.positions == "relative":
      self.distance = ToHeads(*heads, self.dtype)
    if self.positions == "relative" and not self.tied:
      init = partitioned(nn.initializers.zeros, "heads", "head_width")
      self.content_bias = self.param("content_bias", init, heads, jnp.float32)  # u
      self.distance_bias = self.param("distance_bias", init, heads, jnp.float32)  # v

  @property
  def _rate(self) -> float:
    return self.dropout if self.weight_dropout is None else self.weight_dropout

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
    content_bias: Bias | None = None,
    distance_bias: Bias | None = None,
  ) -> Heads:
    """Attends from the queries to the slots and to the tokens up to their own."""
    slots = self.memory.slots(memory)
    documents = document_ids(starts)
    if index is None:
      index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      query_documents = documents
    else:
      query_documents = jnp.take_along_axis(documents, index, axis=1)
    mask = causal_mask(documents, index, query_documents)
    context, M = tokens.astype(self.dtype), 0
    zeros = None
    if slots is not None:
      M = slots.values.shape[1]
      context = jnp.concatenate([slots.values.astype(self.dtype), context], axis=1)
      seen = slots.valid[:, None] & (query_documents == 0)[:, :, None]
      mask = jnp.concatenate([seen, mask], axis=2)
      if self.memory.zeros:
        zeros = places_before(starts, index, M)
        mask = mask | zeros
    if self.memory.window:
      mask = mask & (_distances(M + index, mask.shape[2]) < self.memory.window)
    if self.norm is not None:
      queries, context = self.norm(queries), self.norm(context)
    q = self.query(queries) * self.head_width**-0.5
    k, v = self.key(context), self.value(context)
    if self.positions == "rotary":
      q = rotate(q, M + index)
      k = rotate(k, jnp.arange(k.shape[1], dtype=jnp.int32)[None])
    scores = None
    if self.positions == "relative":
      u = self.content_bias if content_bias is None else content_bias
      v_bias = self.distance_bias if distance_bias is None else distance_bias
      scores = self._by_distance(q, v_bias, M + index, k.shape[1])
      q = q + (u * self.head_width**-0.5).astype(q.dtype)[None, None]
    drop = None
    if self._rate and not deterministic:
      drop = lambda p: self.drop(p, deterministic=False)
    return softmax_attention(q, k, v, mask, scores, drop, zeros)

  def fold(
    self, tokens: Float[Array, "B C D"], starts: Bool[Array, "B C"], memory: State
  ) -> tuple[State, Losses]:
    """The memory after the segment, and the losses of what it replaced."""
    update = self.memory(tokens, starts, memory)
    losses = dict(update.losses)
    if update.replaced is not None:
      losses["reconstruction"] = self._reconstruction(tokens, starts, update.replaced)
    return update.state, losses

  def _by_distance(
    self, q: Float[Array, "B Q H K"], bias: Bias, place: Place, keys: int
  ) -> Float[Array, "B H Q S"]:
    """Transformer-XL's terms (b) and (d) for queries at `place` among S `keys`."""
    S, Q = keys, q.shape[1]
    distances = jnp.arange(S - 1, -1, -1, dtype=jnp.int32)
    if self.memory.farthest:
      distances = jnp.minimum(distances, self.memory.farthest)
    table = sinusoids(distances, self.width)
    r = self.distance(table[None])[0]  # S H K
    q = q + (bias * self.head_width**-0.5).astype(q.dtype)[None, None]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhk,whk->bhqw", q, r, preferred_element_type=wide)
    if self.segment == Q and place.shape[0] == 1:
      return by_key(scores, S)
    column = jnp.clip(S - 1 - _distances(place, S), 0, S - 1)[:, None]  # B 1 Q S
    column = jnp.broadcast_to(column, scores.shape)
    return jnp.take_along_axis(scores, column, axis=3)

  def _reconstruction(self, tokens: Hidden, starts: Mask, replaced: Replaced) -> PerRow:
    """How far attention over the slots is from attention over what they replaced.

    Algorithm 2 of Rae et al., 2019: content alone, no positions; the norm of the
    difference over all queries of the document and all heads. Gradients reach the
    new slots only. Differs from the paper's print, which writes no 1 / sqrt(K): the
    layer attends with that factor, and so does this.
    """
    queries = jax.lax.stop_gradient(tokens)
    q = self.query(queries, frozen=True) * self.head_width**-0.5
    attend = lambda slots: softmax_attention(
      q,
      self.key(slots.values, frozen=True),
      self.value(slots.values, frozen=True),
      slots.valid[:, None],
    )
    wanted = jax.lax.stop_gradient(attend(replaced.old))
    gap = attend(replaced.new) - wanted
    gap = gap.astype(jnp.promote_types(gap.dtype, jnp.float32))
    documents = document_ids(starts)
    own = (documents == documents[:, -1:]) & replaced.new.valid.any(axis=1)[:, None]
    square = jnp.where(own[..., None, None], gap * gap, 0).sum(axis=(1, 2, 3))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
