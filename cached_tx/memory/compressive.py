"""Compressive memory: Rae et al., 2019, arXiv:1911.05507."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cached_tx.memory.base import Comparison, Replaced, Slots, Update
from cached_tx.memory.compressive_options import LEARNED, check
from cached_tx.memory.compressor import Compressor, Decoder
from cached_tx.memory.past import PastMemory
from cached_tx.ops.compress import Reach, most_used, size_of_gap, spread
from cached_tx.ops.fifo import Fifo, empty, push
from cached_tx.types import DType, Hidden, Losses, Mask, PerRow


class CompressiveState(NamedTuple):
  """A FIFO of tokens and a FIFO of what became of older ones. Leaves lead with B."""

  recent: Fifo
  compressed: Fifo


class UsedState(NamedTuple):
  """The same, and how much attention each recent token received, in sum.

  A token collects one mean weight, over heads and queries, for every segment that
  found it in the memory.
  """

  recent: Fifo
  compressed: Fifo
  usage: Float[Array, "B M"]  # float32 or wider; 0 where not valid

  def cleared(self) -> "UsedState":
    """The state with 0 at places that hold nothing, whatever stands there."""
    recent, compressed = self.recent.cleared(), self.compressed.cleared()
    usage = jnp.where(recent.valid, self.usage, 0)
    return UsedState(recent, compressed, usage)


class CompressiveMemory(PastMemory):
  """Keeps the last inputs as they are and older ones compressed (Algorithm 1).

  The tokens that leave the FIFO of recent tokens, a segment at a time, become
  segment / rate slots, computed from the memory before the push. A slot is valid
  only where all its tokens were, and of the row's last document.

  Attributes:
    size: n_m, recent tokens.
    compressed: n_cm, compressed slots.
    rate: c, tokens per slot; any number up to the segment (see `remainder`).
    compressor: mean or max, of `rate` neighbours; conv or dilated, learned (see
      `Compressor`); most_used, which keeps, of each segment's tokens, the one in
      `rate` that received most attention: weights after the softmax, without dropout.
    loss: what trains a learned compressor, and it alone. attention: to leave the
      layer's attention as it was (Algorithm 2). autoencoding: so that a decoder of its
      own tells the tokens from the slots. none: the model's own loss, through two or
      more segments. The other compressors have nothing to train: none.
    overlap: tokens that a convolution sees besides its `rate`; kernel_size of
      the authors' code.
    dilations: tokens between the taps of each dilated convolution. The paper gives
      none.
    padding: what a convolution of more than `rate` tokens does at the edge of a block.
      causal: zeros stand before its oldest token, and there are segment / rate slots.
      valid: every slot sees tokens only, so that there are fewer; the authors' code.
    order: of the slots that most_used keeps: time, as the tokens came; or usage, the
      most used first. Of equals, the older is kept. The paper gives neither.
    usage: most_used counts the attention of the segment that drives a token out; or,
      for life, the mean over all segments that found it in the memory.
    remainder: where slots do not take up all tokens of a segment: refuse; or drop the
      newest ones, the floor(n_s / c) of Algorithm 1.
    norm: of the difference that a loss measures. l2: the root of the sum of squares
      over a row's queries and heads, or its tokens (the paper). mse: the mean of the
      squares (the authors' code).
    products: of the attention that is compared: scaled by K ** -0.5, as the layer's
      own and as in the authors' code; or plain, as Algorithm 2 prints them.
    queries: of the attention that is compared: all of the segment; or later, those
      after every token that was replaced, which differs where size is less than the
      segment (the authors' code).
    weight: of the loss, which is summed over layers (the paper); the authors' code
      takes the mean: 1 / model.layers.
    gradient: where a gradient spans several segments, what it passes from one to the
      next through: carry, all that is remembered; or slots, the compressed ones alone,
      which trains a compressor without a loss as the paper does.
    tables: of relative positions. one: slots and tokens count alike. two: compressed
      slots have a projection and a bias of their own, and stand directly before the
      segment, as if there were no recent tokens (the authors' code).
    start: what stands in the memory before a document. empty: nothing. zeros: zero
      tokens, which are attended to and compressed (Algorithm 1).
    clamp: the largest distance of relative positions, of all tables; 0: any.
    same_length: how many keys a query sees, as of `XLMemory`; M are all slots. The
      authors' code has tensorflow.
    dtype: of the compressor's computation.
  """

  size: int = 128
  compressed: int = 128
  rate: int = 4
  compressor: str = "conv"
  loss: str = "attention"
  overlap: int = 0
  dilations: tuple[int, ...] = (1, 2)
  padding: str = "causal"
  order: str = "time"
  usage: str = "segment"
  remainder: str = "refuse"
  norm: str = "l2"
  products: str = "scaled"
  queries: str = "segment"
  weight: float = 1.0
  gradient: str = "carry"
  tables: str = "one"
  start: str = "empty"
  clamp: int = 0
  same_length: str = "off"
  dtype: DType = jnp.float32

  @property
  def min_tbptt(self) -> int:
    """2 where a choice is about what a gradient of two segments does."""
    return 2 if self._learns_later or self.gradient == "slots" else 1

  @property
  def min_tbptt_reason(self) -> str:
    """Why fewer are refused."""
    if not self._learns_later:
      return (
        "memory.gradient 'slots' is about gradients that cross a boundary; or set it "
        "to carry"
      )
    return (
      "a compressor without a loss of its own is trained only through the slots "
      'that a later segment reads; or set memory.loss to "attention"'
    )

  @property
  def _learns_later(self) -> bool:
    return self.compressor in LEARNED and self.loss == "none"

  @property
  def auxiliary(self) -> tuple[str, ...]:
    """The compressor and its decoder, unless the model's own loss trains it."""
    if self.compressor not in LEARNED or self.loss == "none":
      return ()
    decoder = ("decoder",) if self.loss == "autoencoding" else ()
    return ("compressor", *decoder)

  @property
  def reconstructs(self) -> bool:
    """Whether attention over the replaced tokens is to be reconstructed."""
    return self.compressor in LEARNED and self.loss == "attention"

  @property
  def watches(self) -> bool:
    """Whether an update needs the attention that each key received."""
    return self.compressor == "most_used"

  @property
  def regions(self) -> tuple[tuple[str, int], ...]:
    """Compressed slots, then recent tokens."""
    return (("compressed", self.compressed), ("memory", self.size))

  @property
  def apart(self) -> int:
    """How many of the first slots have relative positions of their own."""
    return self.compressed if self.tables == "two" else 0

  @property
  def reach(self) -> Reach:
    """Which of the tokens that leave become which slot."""
    more = self.overlap + sum(self._dilations) if self.compressor in LEARNED else 0
    left = more if self.padding == "causal" else 0
    return Reach(self.rate, self.rate + more, left)

  @property
  def _dilations(self) -> tuple[int, ...]:
    return tuple(self.dilations) if self.compressor == "dilated" else ()

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not exist or do not fit."""
    del width, heads
    check(self, segment)

  @nn.nowrap
  def initial_state(
    self, batch: int, width: int, heads: int, dtype: DType
  ) -> CompressiveState | UsedState:
    """A memory of nothing, or of zero tokens."""
    del heads
    recent = self.counted(empty(batch, self.size, width, dtype))
    compressed = self.counted(empty(batch, self.compressed, width, dtype))
    if self.compressor == "most_used" and self.usage == "life":
      usage = jnp.zeros((batch, self.size), jnp.promote_types(dtype, jnp.float32))
      return UsedState(recent, compressed, usage)
    return CompressiveState(recent, compressed)

  @nn.nowrap
  def slots(self, state: CompressiveState | UsedState) -> Slots:
    """Compressed slots, then recent tokens, as one contiguous past."""
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    return Slots(*jax.tree.map(join, state.compressed, self._recent(state)))

  @nn.compact
  def __call__(
    self,
    x: Hidden,
    starts: Mask,
    state: CompressiveState | UsedState,
    received: Float[Array, "B S"] | None = None,
  ) -> Update:
    """Returns the memory after the segment `x`.

    Args:
      x: the layer's inputs.
      starts: of documents.
      state: the memory before.
      received: where the memory `watches`, the mean weight, over heads and queries of
        the segment, of each slot and of each token of the segment.

    Raises:
      ValueError: if weights are missing.
    """
    left, recent = push(self._recent(state), x, starts)
    losses: Losses = {}
    replaced = usage = None
    if self.watches:
      if received is None:
        raise ValueError("compressor 'most_used' needs the attention received by keys")
      worth, usage = self._worth(received, state, left, recent)
      new = self._kept(self.counted(left), worth)
    else:
      compress = Compressor(
        self.compressor, self.reach, self._dilations, self.dtype, name="compressor"
      )
      left = self.counted(left)
      new = compress(left, frozen=bool(self.auxiliary))
      if self.auxiliary:
        old = jax.lax.stop_gradient(left)
        apart = compress(old)
        if self.loss == "autoencoding":
          losses["autoencoding"] = self._autoencoding(old, apart)
        else:
          replaced = Replaced(Slots(*old), Slots(*apart), self._comparison(x.shape[1]))
    compressed = self._appended(state.compressed, new, starts)
    recent = self.counted(recent)
    after: CompressiveState | UsedState = CompressiveState(recent, compressed)
    if usage is not None:
      after = UsedState(recent, compressed, usage)
    return Update(after, losses, replaced)

  @nn.nowrap
  def _recent(self, state: CompressiveState | UsedState) -> Fifo:
    """The recent tokens, without a gradient where it takes the other way."""
    cut = self.gradient == "slots"
    return jax.lax.stop_gradient(state.recent) if cut else state.recent

  @nn.nowrap
  def _appended(self, queue: Fifo, new: Fifo, starts: Mask) -> Fifo:
    """Pushes the new slots, and drops all where a document began."""
    count = new.tokens.shape[1]
    kept = queue.valid & ~starts.any(axis=1)[:, None]
    newest = new.tokens.astype(queue.tokens.dtype)
    slots = jnp.concatenate([queue.tokens, newest], axis=1)
    valid = jnp.concatenate([kept, new.valid], axis=1)
    slots = jnp.where(valid[..., None], slots, 0)
    return self.counted(Fifo(slots[:, count:], valid[:, count:]))

  @nn.nowrap
  def _worth(
    self,
    received: Float[Array, "B S"],
    state: CompressiveState | UsedState,
    left: Fifo,
    recent: Fifo,
  ) -> tuple[Float[Array, "B L"], Float[Array, "B M"] | None]:
    """How much the tokens that leave were used, and the usage of those that stay.

    Tokens that leave with the segment that brought them were in no memory: for them,
    its own attention counts.
    """
    L, M = left.tokens.shape[1], self.size
    total = jax.lax.stop_gradient(received)[:, self.compressed :]  # B M+L
    if not isinstance(state, UsedState):
      return jnp.where(left.valid, total[:, :L], 0), None
    found = total[:, :M].astype(state.usage.dtype) + state.usage
    times = np.maximum(-(-(M - np.arange(M + L)) // L), 1)  # segments that found it
    mean = jnp.concatenate([found, total[:, M:].astype(found.dtype)], axis=1)
    mean = mean / jnp.asarray(times, found.dtype)[None]
    usage = jnp.pad(found, ((0, 0), (0, L)))[:, L:]
    usage = jnp.where(recent.valid, usage, 0)
    return jnp.where(left.valid, mean[:, :L], 0), usage

  @nn.nowrap
  def _kept(self, left: Fifo, worth: Float[Array, "B L"]) -> Fifo:
    """The most used of the tokens that leave."""
    slots = self.reach.count(worth.shape[1])
    index = most_used(worth, left.valid, slots, self.order)
    return Fifo(
      jnp.take_along_axis(left.tokens, index[..., None], axis=1),
      jnp.take_along_axis(left.valid, index, axis=1),
    )

  @nn.nowrap
  def _comparison(self, tokens: int) -> Comparison:
    first = max(tokens - self.size, 0) if self.queries == "later" else 0
    return Comparison(self.norm, self.products == "scaled", first, self.weight)

  @nn.nowrap
  def _autoencoding(self, old: Fifo, new: Fifo) -> PerRow:
    """How far the decoded slots are from the tokens that they stand for: L_ae."""
    decode = Decoder(self.reach, self.dtype, name="decoder")
    gap = decode(new.tokens)
    lost = jnp.where(new.valid, 0.0, 1.0)[..., None, None]
    lost = jnp.broadcast_to(lost, (*new.valid.shape, decode.taps, 1))
    counted = spread(lost, self.rate)[..., 0] == 0  # by valid slots alone
    gap = gap - old.tokens[:, : gap.shape[1]]
    return self.weight * size_of_gap(gap, counted, self.norm)
