"""Compressive memory: Rae et al., 2019, arXiv:1911.05507."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cached_tx.memory.base import (
  MemoryModule,
  Replaced,
  Slots,
  Update,
  partitioned,
)
from cached_tx.ops.fifo import Fifo, empty, push
from cached_tx.ops.resample import blocks
from cached_tx.types import DType, Hidden, Mask

COMPRESSORS = ("mean", "conv")
LOSSES = ("attention", "none")


class CompressiveState(NamedTuple):
  """A FIFO of tokens and a FIFO of what became of older ones. Leaves lead with B."""

  recent: Fifo
  compressed: Fifo


class Compressor(nn.Module):
  """Folds each `rate` neighbouring tokens into one slot.

  The convolution has kernel and stride `rate` and no bias (a bias would turn absent
  tokens into slots that look like memories). Differs from the paper: it starts as
  the mean of its tokens, so that its slots are of use before it is trained.

  Attributes:
    rate: c.
    kind: mean or conv.
    dtype: of the computation.
  """

  rate: int
  kind: str
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Hidden, frozen: bool = False) -> Float[Array, "B M D"]:
    """Returns L / rate slots. `frozen` passes gradients to x, none to the kernel."""
    cut = blocks(x, self.rate)
    if self.kind == "mean":
      return cut.mean(axis=2)
    D = x.shape[-1]

    def start(key, shape, dtype):
      del key
      return jnp.broadcast_to(jnp.eye(D, dtype=dtype)[None] / self.rate, shape)

    kernel = self.param(
      "kernel",
      partitioned(start, None, None, "embed"),
      (self.rate, D, D),
      jnp.float32,
    )
    kernel = jax.lax.stop_gradient(kernel) if frozen else kernel
    kernel = kernel.astype(jnp.promote_types(self.dtype, x.dtype))
    return jnp.einsum("bmrd,rde->bme", cut, kernel).astype(x.dtype)


class CompressiveMemory(MemoryModule):
  """Keeps the last inputs as they are and older ones compressed (Algorithm 1).

  The tokens that leave the FIFO of recent tokens, a segment at a time, become
  segment / rate slots, computed from the memory before the push. A slot is valid
  only where all its tokens were, and of the row's last document.

  Attributes:
    size: n_m, recent tokens.
    compressed: n_cm, compressed slots.
    rate: c; it divides the segment.
    compressor: mean or conv.
    loss: attention trains the compressor, and it alone, to leave the layer's attention
      as it was (Algorithm 2); none leaves it to the model's loss, through two or more
      segments. The mean has nothing to train: its loss is none.
    dtype: of the compressor's computation.
  """

  size: int = 128
  compressed: int = 128
  rate: int = 4
  compressor: str = "conv"
  loss: str = "attention"
  dtype: DType = jnp.float32

  @property
  def min_tbptt(self) -> int:
    """2 where only the model's own loss can train the compressor."""
    return 2 if self.compressor == "conv" and self.loss == "none" else 1

  @property
  def min_tbptt_reason(self) -> str:
    """Why fewer are refused."""
    return (
      "a compressor without a loss of its own is trained only through the slots "
      'that a later segment reads; or set memory.loss to "attention"'
    )

  @property
  def auxiliary(self) -> tuple[str, ...]:
    """The compressor, unless the model's own loss trains it."""
    return ("compressor",) if self.reconstructs else ()

  @property
  def reconstructs(self) -> bool:
    """Whether attention over the replaced tokens is to be reconstructed."""
    return self.compressor == "conv" and self.loss == "attention"

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not fit."""
    del width, heads
    if self.rate < 1 or segment % self.rate:
      raise ValueError(
        f"memory.rate is {self.rate}; it must divide the segment of {segment} tokens, "
        "or tokens would be dropped: change memory.rate or segment"
      )
    if self.size < 0 or self.compressed < 0:
      raise ValueError(
        f"memory.size and memory.compressed are {self.size} and {self.compressed}; "
        "both count slots: 0 or more"
      )
    if self.compressor not in COMPRESSORS:
      raise ValueError(
        f"memory.compressor is {self.compressor!r}; one of {COMPRESSORS}"
      )
    if self.loss not in LOSSES:
      raise ValueError(f"memory.loss is {self.loss!r}; one of {LOSSES}")
    if self.loss == "attention" and self.compressor == "mean":
      raise ValueError(
        "memory.loss is 'attention', but memory.compressor 'mean' has nothing to "
        "train: set memory.loss to none, or memory.compressor to conv"
      )
    if self.compressor == "conv" and not self.compressed:
      raise ValueError(
        "memory.compressed is 0, so a convolution would never be read: set "
        "memory.compressor to mean and memory.loss to none, or memory.kind to xl"
      )

  @nn.nowrap
  def initial_state(
    self, batch: int, width: int, heads: int, dtype: DType
  ) -> CompressiveState:
    """An empty memory."""
    del heads
    return CompressiveState(
      empty(batch, self.size, width, dtype), empty(batch, self.compressed, width, dtype)
    )

  @nn.nowrap
  def slots(self, state: CompressiveState) -> Slots:
    """Compressed slots, then recent tokens, as one contiguous past."""
    both = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b], axis=1), state.compressed, state.recent
    )
    return Slots(*both)

  @nn.compact
  def __call__(self, x: Hidden, starts: Mask, state: CompressiveState) -> Update:
    """Returns the memory after the segment `x`."""
    compress = Compressor(self.rate, self.compressor, self.dtype, name="compressor")
    left, recent = push(state.recent, x, starts)
    valid = blocks(left.valid[..., None], self.rate)[..., 0].all(axis=2)
    new = compress(left.tokens, frozen=self.reconstructs)
    new = jnp.where(valid[..., None], new, 0)
    kept = state.compressed.valid & ~starts.any(axis=1)[:, None]
    slots = jnp.concatenate(
      [state.compressed.tokens, new.astype(recent.tokens.dtype)], axis=1
    )
    slot_valid = jnp.concatenate([kept, valid], axis=1)
    slots = jnp.where(slot_valid[..., None], slots, 0)
    count = new.shape[1]
    compressed = Fifo(slots[:, count:], slot_valid[:, count:])
    after = CompressiveState(recent, compressed)
    if not self.reconstructs:
      return Update(after)
    old = jax.lax.stop_gradient(left)
    apart = jnp.where(valid[..., None], compress(old.tokens), 0)
    return Update(after, {}, Replaced(Slots(*old), Slots(apart, valid)))
