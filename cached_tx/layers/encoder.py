"""Layers of encoders: attention in both directions, alone and beside a shared cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import kernel_for
from cached_tx.layers.projections import FromHeads, ToHeads
from cached_tx.memory import GRCMemory, GRCState, Slots, partitioned
from cached_tx.ops.blockwise import blockwise_attention
from cached_tx.ops.documents import document_ids
from cached_tx.ops.positions import rotate
from cached_tx.ops.sight import Sight
from cached_tx.types import DType, Heads, Hidden, Losses, Segment

PROJECTIONS = ("joint", "branches")
POSITIONS = ("none", "rotary")


class EncoderAttention(nn.Module):
  """Attention over all real tokens of a token's document; returns heads.

  Attributes:
    width: D.
    heads: H.
    positions: none, or rotary, which count real tokens only.
    bias: whether queries, keys and values have biases.
    dropout: rate on the attention's weights.
    kernel: as `softmax_attention`, whose arguments it gets by position, and `dropout`,
      a function or None, by name. None: `blockwise_attention`.
    dtype: of the computation. Parameters are float32.
  """

  width: int
  heads: int
  positions: str = "none"
  bias: bool = False
  dropout: float = 0.0
  kernel: Callable[..., Heads] | None = None
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding."""
    K = self.width // self.heads
    bias = 0.0 if self.bias else None
    project = lambda name: ToHeads(self.heads, K, self.dtype, bias, name=name)(x)
    q, k, v = project("query"), project("key"), project("value")
    valid = segment.real
    documents = document_ids(segment.starts & valid)
    if self.positions == "rotary":
      place = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
      q, k = rotate(q, place), rotate(k, place)
    drop, q = Dropout(self.dropout), q * K**-0.5
    if self.kernel is None:
      sight, own = Sight(documents, documents, valid), drop.drop(deterministic)
      options: Any = {"causal": False, "offset": 0, "drop": own}
      kernel = kernel_for("auto", q.shape[1])
      return blockwise_attention(q, k, v, sight, kernel=kernel, **options)
    mask = (documents[:, None] == documents[:, :, None]) & valid[:, None]  # B Q S
    return self.kernel(q, k, v, mask, dropout=drop.function(deterministic))


class GatedEncoderAttention(nn.Module):
  """Blends an attention in both directions and one over a cache shared by all rows.

  O^h = sigmoid(lambda_h) o_mem^h + (1 - sigmoid(lambda_h)) o_self^h, equations 1 to 5
  of Zhang et al., 2024, arXiv:2312.12742, update first and attention after (Algorithm
  1); see `GRCMemory` for the choices about the cache. o_mem's queries are the first D_m
  channels of the input; it fills the first D_m / H channels of every head. Before
  anything has been left in the cache, o_self stands alone.

  The layer is a function of state, y, state = f(x, state), whose rows may differ in
  number and length from call to call. A padded token does not exist: it is 0 in the
  output and no part of the interpolation, and a row of padding no part of the mean.
  A row is an example: its documents do not attend each other, but where each row reads
  its own update of the cache, they meet there.

  Attributes:
    width: D.
    heads: H; divides D and D_m.
    memory: in shared scope.
    inner: gives o_self: called as `inner(x, segment, deterministic=...)`, with x 0 at
      padding, it returns heads, B L H K. A module of Flax or any function. None:
      `EncoderAttention` with this layer's options.
    positions: of that attention: none or rotary.
    kernel: of both branches, as of `EncoderAttention`.
    projection: joint, one output projection after the blend (the paper's multi-head
      attention); or branches, one in each branch before it (the authors' code), where
      what the memory summarises as attention is projected too.
    bias: whether queries, keys and values have biases. Output projections do.
    grid: rows and columns of the token grid: adds a 3 x 3 convolution over it, of the
      layer's input, in D_m groups (the authors' code). None: no convolution.
    prefix: tokens before the grid's, such as a class token, to which it adds nothing.
    dropout: rate on the attention's weights.
    output_dropout: rate on the output before the convolution; None: that of `dropout`.
    dtype: of the computation. Parameters are float32.
    xavier: what kernels of its own start as, see `kernel_init`.
  """

  width: int
  heads: int
  memory: GRCMemory
  inner: Callable[..., Heads] | None = None
  positions: str = "none"
  kernel: Callable[..., Heads] | None = None
  projection: str = "joint"
  bias: bool = False
  grid: tuple[int, int] | None = None
  prefix: int = 0
  dropout: float = 0.0
  output_dropout: float | None = None
  dtype: DType = jnp.float32
  xavier: bool = False

  @property
  def channels(self) -> int:
    """D_m."""
    return self.memory.channels(self.width)

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    if self.width % self.heads:
      raise ValueError(
        f"heads is {self.heads}, which does not divide width {self.width}"
      )
    self.memory.check(1, self.width, self.heads)
    if self.memory.cache != "shared":
      raise ValueError(
        f"memory.cache is {self.memory.cache!r}; an encoder's rows share one cache: "
        "set it to shared, or use the memory in a causal model"
      )
    for name, known in (("projection", PROJECTIONS), ("positions", POSITIONS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name} is {getattr(self, name)!r}; one of {', '.join(known)}"
        )
    if self.inner is not None and self.positions != "none":
      raise ValueError(
        f"positions is {self.positions!r}, which the inner attention that was given "
        "would not see: set positions to none"
      )
    if self.positions == "rotary" and self.width // self.heads % 2:
      raise ValueError(
        "rotary positions turn pairs of channels, but a head has "
        f"{self.width // self.heads}: change width, heads or positions"
      )
    if self.grid is not None and self.width % self.channels:
      raise ValueError(
        f"memory.ratio {self.memory.ratio} makes {self.channels} groups, which do not "
        f"divide the width of {self.width}: the convolution over the grid needs that"
      )
    if self.prefix < 0 or (self.prefix and self.grid is None):
      raise ValueError(
        f"prefix is {self.prefix}; it counts tokens before a grid, 0 or more"
      )

  def setup(self) -> None:
    """Makes what both branches need."""
    self.check()
    own = self.inner
    if own is None:
      own = EncoderAttention(
        self.width,
        self.heads,
        self.positions,
        self.bias,
        self.dropout,
        self.kernel,
        self.dtype,
      )
    self.own = own
    heads = (self.heads, self.channels // self.heads)
    bias = 0.0 if self.bias else None
    part = lambda: ToHeads(*heads, self.dtype, bias, self.xavier)
    self.memory_query, self.memory_key, self.memory_value = part(), part(), part()
    start = nn.initializers.constant(self.memory.lambda_start)
    init = partitioned(start, "heads")
    self.gate = self.param("gate", init, (self.heads,), jnp.float32)  # lambda
    joined = lambda width: FromHeads(width, 1.0, self.dtype, True, self.xavier)
    self.output = joined(self.width)
    if self.projection == "branches":
      self.memory_output = joined(self.channels)
    self.drop = Dropout(self.dropout)
    last = self.dropout if self.output_dropout is None else self.output_dropout
    self.drop_output = Dropout(last)
    if self.grid is not None:
      lecun = nn.initializers.lecun_normal()
      self.convolution = nn.Conv(
        self.width,
        (3, 3),
        padding="SAME",
        feature_group_count=self.channels,
        kernel_init=partitioned(lecun, None, None, None, "embed"),
        dtype=self.dtype,
      )

  @nn.nowrap
  def initial_state(self, batch: int = 1) -> GRCState:
    """An empty cache, one for any number of rows."""
    self.check()
    return self.memory.initial_state(batch, self.width, self.heads, self.dtype)

  @nn.nowrap
  def gauges(self, params: Any) -> dict[str, Float[Array, "... H"]]:
    """sigmoid(lambda), the share of the cache in each head."""
    return {"gate": nn.sigmoid(params["gate"])}

  def __call__(
    self,
    x: Hidden,
    state: GRCState,
    segment: Segment,
    *,
    training: bool | None = None,
    deterministic: bool = True,
    grid: tuple[int, int] | None = None,
  ) -> tuple[Hidden, GRCState, Losses]:
    """Updates the cache, if in training, and attends.

    Args:
      x: the layer's input, any float dtype; any number of rows and tokens.
      state: from `initial_state` or from a former call.
      segment: document starts and padding of the tokens.
      training: whether these rows update the cache. None: if not `deterministic`.
      deterministic: False turns dropout on; needs the rng "dropout" if there is any.
      grid: rows and columns, where they are not the layer's own.

    Returns:
      The output, 0 at padding; the state afterwards, the same unless in training; no
      losses.

    Raises:
      ValueError: where the settings do not fit, or the tokens do not fill the grid.
    """
    training = not deterministic if training is None else training
    valid = segment.real
    x = jnp.where(valid[..., None], x, 0)
    own = self.own(x, segment, deterministic=deterministic)
    own = jnp.where(valid[..., None, None], own, 0)
    self._check_heads(own.shape[-1])
    if self.projection == "branches":
      own = self.output(own).reshape(own.shape)
      own = jnp.where(valid[..., None, None], own, 0)
    seen = x
    if self.memory.summary == "attention":
      seen = own.reshape(*own.shape[:2], -1)
    slots, state = self.memory.shared(seen, valid, state, training)
    y = self._blend(own, *self._read(x, slots, deterministic))
    y = self.drop_output(y, deterministic=deterministic)
    if self.grid is not None:
      y = y + self._positions(x, grid or self.grid)
    elif grid is not None:
      raise ValueError(f"grid is {grid}, but the layer has none: give it one")
    return jnp.where(valid[..., None], y, 0), state, {}

  @nn.nowrap
  def _check_heads(self, own: int) -> None:
    """Raises ValueError if heads of the inner attention cannot take those of the cache.

    The cache's fill the first channels of a head.
    """
    least = self.channels // self.heads
    if self.projection == "branches":
      least = self.width // self.heads
    if own < least or (self.projection == "branches" and own != least):
      raise ValueError(
        f"heads of the inner attention are {own} wide; with memory.ratio "
        f"{self.memory.ratio} and projection {self.projection!r} they must be {least}"
        f"{'' if self.projection == 'branches' else ' or more'}"
      )

  def _read(
    self, x: Hidden, slots: Slots, deterministic: bool
  ) -> tuple[Heads, Bool[Array, "#B"]]:
    """What each token finds in the cache; which rows find anything."""
    B = x.shape[0]
    values = slots.values.astype(self.dtype)
    k, v = self.memory_key(values), self.memory_value(values)
    k, v = (jnp.broadcast_to(a, (B, *a.shape[1:])) for a in (k, v))
    q = self.memory_query(x[..., : self.channels])
    q = q * q.shape[-1] ** -0.5
    if self.kernel is None:
      sight, own = Sight(key_valid=slots.valid), self.drop.drop(deterministic)
      options: Any = {"causal": False, "offset": 0, "drop": own}
      kernel = kernel_for("auto", q.shape[1])
      found = blockwise_attention(q, k, v, sight, kernel=kernel, **options)
    else:
      mask = jnp.broadcast_to(slots.valid[:, None], (B, 1, slots.valid.shape[1]))
      found = self.kernel(q, k, v, mask, dropout=self.drop.function(deterministic))
    if self.projection == "branches":
      found = self.memory_output(found).reshape(found.shape)
    return found, slots.valid.any(axis=1)

  def _blend(
    self, own: Heads, found: Float[Array, "B L H E"], seen: Bool[Array, "#B"]
  ) -> Hidden:
    """Equation 2, and the output projection where it comes after."""
    pad = own.shape[-1] - found.shape[-1]
    found = jnp.pad(found, ((0, 0), (0, 0), (0, 0), (0, pad)))
    gate = nn.sigmoid(self.gate)[None, None, :, None]
    gate = jnp.where(seen[:, None, None, None], gate, 0).astype(self.dtype)
    heads = gate * found + (1 - gate) * own
    if self.projection == "branches":
      return heads.reshape(*heads.shape[:2], self.width)
    return self.output(heads)

  def _positions(self, x: Hidden, grid: tuple[int, int]) -> Hidden:
    """The convolution over the grid, 0 before it."""
    B, L, D = x.shape
    rows, columns = grid
    if self.prefix + rows * columns != L:
      raise ValueError(
        f"{L} tokens do not fill a grid of {rows} x {columns} after a prefix of "
        f"{self.prefix}: change grid or prefix"
      )
    square = x[:, self.prefix :].reshape(B, rows, columns, D)
    flat = self.convolution(square).reshape(B, rows * columns, D)
    return jnp.pad(flat, ((0, 0), (self.prefix, 0), (0, 0)))
