"""Gated recurrent cache: Zhang et al., 2024, arXiv:2312.12742."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool

from cached_tx.memory.base import MemoryModule, Slots, Update, partitioned
from cached_tx.ops.documents import last_document
from cached_tx.ops.resample import nearest
from cached_tx.types import DType, Hidden, Mask, Memory


class GRCState(NamedTuple):
  """What one layer carries from segment to segment. Leaves lead with B."""

  cache: Memory  # float32 or wider: small gate steps vanish in bfloat16
  filled: Bool[Array, "B"]  # False until the row's document has left something

  def cleared(self) -> "GRCState":
    """The cache with 0 in rows that are not filled, whatever stands there."""
    return GRCState(jnp.where(self.filled[..., None, None], self.cache, 0), self.filled)


class GRCMemory(MemoryModule):
  """Folds the last document of each segment into M slots (equations 4 and 5).

  Every row keeps a cache of its own. A segment reads the cache that earlier segments
  left and is folded in afterwards. Differs from the paper, which updates the cache
  from a segment first and then reads it: in a causal model, that shows every token
  a summary of later ones; and which keeps the mean over the batch.

  Attributes:
    size: T_m, slots; any number: tokens are interpolated to it (nearest).
    ratio: r, the first r D channels are cached.
    dtype: of the gates' products; the state stays float32 or wider.
  """

  size: int = 128
  ratio: float = 0.5
  dtype: DType = jnp.float32

  reader = "gated"

  @property
  def min_tbptt(self) -> int:
    """2: see the reason."""
    return 2

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
    if self.channels(width) % heads:
      raise ValueError(
        f"memory.ratio {self.ratio} of model.width {width} is {self.channels(width)} "
        f"channels, which model.heads = {heads} does not divide"
      )

  @nn.nowrap
  def initial_state(self, batch: int, width: int, heads: int, dtype: DType) -> GRCState:
    """An empty cache."""
    del heads
    wide = jnp.promote_types(dtype, jnp.float32)
    cache = jnp.zeros((batch, self.size, self.channels(width)), wide)
    return GRCState(cache, jnp.zeros((batch,), bool))

  @nn.nowrap
  def slots(self, state: GRCState) -> Slots:
    """The cache: all of it or nothing."""
    valid = jnp.broadcast_to(state.filled[:, None], state.cache.shape[:2])
    return Slots(state.cache, valid)

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: GRCState) -> Update:
    """Returns the cache after the segment `x`."""
    width = state.cache.shape[-1]
    first, length = last_document(starts)
    went_on = ~starts.any(axis=1)
    old = jnp.where(went_on[:, None, None], state.cache, 0)
    new = nearest(x[..., :width], first, length, self.size).astype(old.dtype)

    def linear(name, both):
      init = partitioned(nn.initializers.lecun_normal(), "embed", None)
      out = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(both)
      return out.astype(old.dtype)

    both = jnp.concatenate([new, old], axis=-1)  # B M 2D
    update = nn.sigmoid(linear("update", both))  # eq. 4
    reset = nn.sigmoid(linear("reset", both))  # eq. 4
    both = jnp.concatenate([new, reset * old], axis=-1)
    cache = (1 - update) * old + update * linear("candidate", both)  # eq. 5
    return Update(GRCState(cache, jnp.ones_like(state.filled)))
