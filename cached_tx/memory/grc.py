"""Gated recurrent cache: Zhang et al., 2024, arXiv:2312.12742."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.memory.base import MemoryModule, Slots, Update, partitioned
from cached_tx.ops.documents import last_document
from cached_tx.ops.resample import nearest, nearest_valid
from cached_tx.types import DType, Hidden, Mask, Memory

CACHES = ("stream", "shared")
SUMMARIES = ("input", "attention")
CANDIDATES = ("linear", "gelu")
ATTENDED = {"stream": ("previous",), "shared": ("mean", "updated")}  # default first


class GRCState(NamedTuple):
  """What one layer carries on. Leaves lead with B; in shared scope with 1."""

  cache: Memory  # float32 or wider: small gate steps vanish in bfloat16
  filled: Bool[Array, "B"]  # False until something has been left in the cache

  def cleared(self) -> "GRCState":
    """The cache with 0 in rows that are not filled, whatever stands there."""
    return GRCState(jnp.where(self.filled[..., None, None], self.cache, 0), self.filled)


class Map(nn.Module):
  """Kernel and bias of an affine map.

  Attributes:
    width: E, channels that it gives.
  """

  width: int

  @nn.compact
  def __call__(self, inputs: int) -> tuple[Float[Array, "_ E"], Float[Array, "E"]]:
    """Makes them, for so many input channels."""
    init = partitioned(nn.initializers.lecun_normal(), "embed", None)
    kernel = self.param("kernel", init, (inputs, self.width), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
    return jnp.asarray(kernel), jnp.asarray(bias)


class GRCMemory(MemoryModule):
  """M slots of D_m = r D channels, updated through gates (equations 4 and 5).

    g_u, g_r = sigmoid(W_u [X, C]), sigmoid(W_r [X, C]),
    C' = (1 - g_u) C + g_u candidate(W_c [X, g_r C])

  X is the first D_m channels of what is summarised, interpolated to M tokens (nearest).

  Stream scope: every row keeps a cache of its own, for causal models. A segment reads
  the cache that earlier segments left, and its last document is folded in afterwards.
  Differs from the paper, which updates the cache from a segment first and then reads
  it: in a causal model, that shows every token a summary of later ones.

  Shared scope: one cache for all rows, for encoders (`GatedEncoderAttention`). In
  training a batch first updates it, by the mean over the rows that have tokens, then
  attends; the gradient ends at the cache from before and at the one left behind.

  Attributes:
    size: T_m, slots; any number: tokens are interpolated to it.
    ratio: r, above 0, at most 1.
    cache: stream, one for every row; or shared, one for all rows.
    summary: what is folded in: input, that of the layer (the paper); or attention, the
      output of its own attention (the authors' code).
    attend: which cache is read. Stream: previous, before the segment's update. Shared:
      mean, the one that is left behind (the paper); or updated, the row's own update of
      the cache from before (the authors' code). None: the first of these.
    eval_update: shared scope, whether evaluation reads the row's own update of the
      frozen cache (the authors' code) instead of the cache itself (the paper). It is
      never stored, so neither depends on the other rows. A stream always updates:
      True, and None, which means False in shared scope.
    candidate: linear (the paper); or gelu, LayerNorm(gelu(.)) with the exact gelu and
      an epsilon of 1e-5 (the authors' code).
    lambda_start: what lambda, the heads' gates, start at: 0 in the paper, -1 in the
      authors' code.
    inner: stream scope, tokens of a Transformer-XL memory that the attention beside the
      cache has (the paper's language models); 0: none.
    dtype: of the gates' products; the state stays float32 or wider.
  """

  size: int = 128
  ratio: float = 0.5
  cache: str = "stream"
  summary: str = "input"
  attend: str | None = None
  eval_update: bool | None = None
  candidate: str = "linear"
  lambda_start: float = 0.0
  inner: int = 0
  dtype: DType = jnp.float32

  reader = "gated"

  @property
  def min_tbptt(self) -> int:
    """2 where the cache is read before it is updated: see the reason."""
    return 2 if self.cache == "stream" else 1

  @property
  def min_tbptt_reason(self) -> str:
    """Why fewer are refused."""
    return (
      "a causal gated recurrent cache is read before it is updated, so its gates "
      "are trained only through the next segment"
    )

  @nn.nowrap
  def channels(self, width: int) -> int:
    """D_m = r D."""
    return round(self.ratio * width)

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not fit."""
    del segment
    if self.size < 1:
      raise ValueError(f"memory.size is {self.size}; a cache has 1 slot or more")
    if not 0 < self.ratio <= 1:
      raise ValueError(f"memory.ratio is {self.ratio}; it lies in (0, 1]")
    channels = self.channels(width)
    if channels < 1 or channels % heads:
      raise ValueError(
        f"memory.ratio {self.ratio} of model.width {width} is {channels} "
        f"channels, which model.heads = {heads} does not divide"
      )
    self._check_choices()

  @nn.nowrap
  def _check_choices(self) -> None:
    for name, known in (
      ("cache", CACHES), ("summary", SUMMARIES), ("candidate", CANDIDATES)
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise ValueError(
          f"memory.{name} is {getattr(self, name)!r}; one of {', '.join(known)}"
        )
    allowed = ATTENDED[self.cache]
    if self.attend not in (None, *allowed):
      why = {
        "stream": "a causal model may read only what earlier segments left",
        "shared": "its gates learn only if the cache is read after their update",
      }[self.cache]
      raise ValueError(
        f"memory.attend is {self.attend!r}; in {self.cache} scope it is one of "
        f"{', '.join(allowed)}: {why}"
      )
    if self.cache == "stream" and self.eval_update is False:
      raise ValueError(
        "memory.eval_update is False, but a stream's cache is empty unless the stream "
        "updates it: drop the key"
      )
    if self.inner < 0 or (self.inner and self.cache == "shared"):
      raise ValueError(
        f"memory.inner is {self.inner}; it counts tokens, 0 or more, and is 0 in "
        "shared scope, for an encoder has no earlier tokens"
      )

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> GRCState:
    """An empty cache for each of `batch` rows; in shared scope, one for all."""
    del heads
    rows = 1 if self.cache == "shared" else batch
    wide = jnp.promote_types(dtype, jnp.float32)
    cache = jnp.zeros((rows, self.size, self.channels(width)), wide)
    return GRCState(cache, jnp.zeros((rows,), bool))

  @nn.nowrap
  def slots(self, state: GRCState) -> Slots:
    """The cache: all of it or nothing."""
    valid = jnp.broadcast_to(state.filled[:, None], state.cache.shape[:2])
    return Slots(state.cache, valid)

  def __call__(self, x: Hidden, starts: Mask, state: GRCState) -> Update:
    """Stream scope: the cache after the segment `x`, what is summarised."""
    width = state.cache.shape[-1]
    first, length = last_document(starts)
    went_on = ~starts.any(axis=1)
    old = jnp.where(went_on[:, None, None], state.cache, 0)
    new = nearest(x[..., :width], first, length, self.size)
    return Update(GRCState(self.gated(new, old), jnp.ones_like(state.filled)))

  def shared(
    self, x: Hidden, valid: Mask, state: GRCState, training: bool
  ) -> tuple[Slots, GRCState]:
    """Shared scope: what the rows of a batch read, and the cache after the batch.

    Args:
      x: what is summarised, first D_m channels; 0 at padding.
      valid: the tokens that are real.
      state: the cache before the batch; no gradient reaches it.
      training: whether the batch updates the cache.

    Returns:
      Slots for every row or, leading with 1, for all rows; and the state, as it was
      unless training. Gradients flow to `x` through the slots alone.
    """
    state = jax.lax.stop_gradient(state)
    training = training or self.is_initializing()  # or the gates would not be made
    if not training and not self.eval_update:
      return self.slots(state), state
    width = state.cache.shape[-1]
    new = nearest_valid(x[..., :width], valid, self.size)
    old = jnp.broadcast_to(state.cache, new.shape)
    some = valid.any(axis=1)[:, None, None]
    own = jnp.where(some, self.gated(new, old), old)  # B M D
    each = GRCState(own, state.filled | some[:, 0, 0])
    if not training:
      return self.slots(each), state
    # The global batch's mean: under jit a sum over sharded rows crosses devices.
    count = jnp.maximum(some.sum(axis=0, keepdims=True), 1)  # 1 1 1
    mean = jnp.where(some, own, 0).sum(axis=0, keepdims=True) / count
    mean = jnp.where(some.any(axis=0, keepdims=True), mean, state.cache)
    after = GRCState(mean.astype(own.dtype), state.filled | some.any())
    read = each if self.attend == "updated" else after
    return self.slots(read), jax.lax.stop_gradient(after)

  @nn.compact
  def gated(
    self, new: Float[Array, "B M E"], old: Float[Array, "B M E"]
  ) -> Float[Array, "B M E"]:
    """The cache `old` after `new`, both B M D_m, in the dtype of `old`."""
    width = old.shape[-1]
    new = new.astype(old.dtype)

    def linear(both, *names):
      """One product for maps of the same input."""
      maps = [Map(width, name=name)(2 * width) for name in names]
      kernel, bias = (
        jnp.concatenate(parts, axis=-1).astype(self.dtype)
        for parts in zip(*maps, strict=True)
      )
      out = both.astype(self.dtype) @ kernel + bias[None, None]
      return jnp.split(out.astype(old.dtype), len(names), axis=-1)

    both = jnp.concatenate([new, old], axis=-1)  # B M 2D
    update, reset = map(nn.sigmoid, linear(both, "update", "reset"))  # eq. 4
    both = jnp.concatenate([new, reset * old], axis=-1)
    (candidate,) = linear(both, "candidate")
    if self.candidate == "gelu":
      norm = nn.LayerNorm(
        epsilon=1e-5, dtype=old.dtype, use_fast_variance=False, name="candidate_norm"
      )
      candidate = norm(nn.gelu(candidate, approximate=False))
    return (1 - update) * old + update * candidate  # eq. 5
