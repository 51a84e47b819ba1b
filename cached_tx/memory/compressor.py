"""What a compressive memory learns: the compressor, and a decoder to train it by."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cached_tx.memory.base import partitioned
from cached_tx.ops.compress import (
  Reach,
  all_valid,
  convolve,
  max_pool,
  mean_pool,
  spread,
)
from cached_tx.ops.fifo import Fifo
from cached_tx.types import DType, Hidden, Memory


def _kernel(
  module: nn.Module, start: Sequence[float], width: int, frozen: bool
) -> Float[Array, "taps D D"]:
  """The parameter `kernel`; each tap starts as so many times the identity."""

  def init(key, shape, dtype):
    del key
    each = jnp.asarray(start, dtype)[:, None, None]
    return jnp.broadcast_to(each * jnp.eye(width, dtype=dtype)[None], shape)

  shape = (len(start), width, width)
  init = partitioned(init, None, None, "embed")
  kernel = module.param("kernel", init, shape, jnp.float32)
  return jax.lax.stop_gradient(kernel) if frozen else kernel


class Dilated(nn.Module):
  """A convolution of two taps, without bias, and ReLU.

  Attributes:
    dilation: tokens between the taps.
    causal: whether as many zeros stand before the first token; else there are fewer
      outputs than tokens.
    dtype: of the computation.
  """

  dilation: int
  causal: bool
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Hidden, frozen: bool) -> Float[Array, "B L1 D"]:
    """Returns the outputs. `frozen` as of `Compressor`."""
    kernel = _kernel(self, (0.0, 1.0), x.shape[-1], frozen)
    kernel = kernel.astype(jnp.promote_types(self.dtype, x.dtype))
    left = self.dilation if self.causal else 0
    return nn.relu(convolve(x, kernel, dilation=self.dilation, left=left))


class Compressor(nn.Module):
  """Folds a block of tokens into fewer slots.

  mean and max take `rate` neighbours to one slot, channel by channel. conv is a
  convolution with stride `rate` and no bias (a bias would turn absent tokens into
  slots that look like memories). dilated puts before it, for each dilation, a
  convolution of two taps and ReLU, as the authors' code does. Differs from the paper:
  the convolution starts as the mean of its tokens and the dilated ones as the
  identity, so that slots are of use before they are trained.

  Attributes:
    kind: mean, max, conv or dilated.
    reach: which tokens become which slot.
    dilations: of the dilated convolutions, in their order; else none.
    dtype: of the computation.
  """

  kind: str
  reach: Reach
  dilations: tuple[int, ...] = ()
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, block: Fifo, frozen: bool = False) -> Fifo:
    """Returns the slots of a block, 0 where not valid.

    A slot is valid only where all tokens that it sees are. `frozen` passes gradients
    to the block, none to the parameters.
    """
    x = block.tokens
    valid = all_valid(block.valid, self.reach)
    if self.kind == "mean":
      slots = mean_pool(x, self.reach.rate)
    elif self.kind == "max":
      slots = max_pool(x, block.valid, self.reach.rate)
    else:
      slots = self._convolved(x, frozen).astype(x.dtype)
    return Fifo(jnp.where(valid[..., None], slots, 0), valid)

  def _convolved(self, x: Hidden, frozen: bool) -> Memory:
    causal = self.reach.left > 0
    taps = self.reach.span - sum(self.dilations)
    left = self.reach.left - sum(self.dilations) if causal else 0
    kernel = _kernel(self, (1 / taps,) * taps, x.shape[-1], frozen)
    kernel = kernel.astype(jnp.promote_types(self.dtype, x.dtype))
    for i, dilation in enumerate(self.dilations):
      x = Dilated(dilation, causal, self.dtype, name=f"dilated_{i}")(x, frozen)
    return convolve(x, kernel, stride=self.reach.rate, left=left)


class Decoder(nn.Module):
  """g of the paper: what a block of tokens was, from its slots.

  A transposed convolution, with a bias: every slot tells of the tokens that it sees,
  or, where zeros were put before the block, of its own `rate`. Each tap starts as the
  identity.

  Attributes:
    reach: of the compressor.
    dtype: of the computation.
  """

  reach: Reach
  dtype: DType = jnp.float32

  @property
  def taps(self) -> int:
    """Tokens that a slot tells of."""
    return self.reach.rate if self.reach.left else self.reach.span

  @nn.compact
  def __call__(self, slots: Memory) -> Hidden:
    """Returns the oldest (M - 1) rate + taps tokens of the block."""
    D = slots.shape[-1]
    dtype = jnp.promote_types(self.dtype, slots.dtype)
    kernel = _kernel(self, (1.0,) * self.taps, D, frozen=False).astype(dtype)
    init = partitioned(nn.initializers.zeros, "embed")
    bias = self.param("bias", init, (D,), jnp.float32).astype(dtype)
    parts = jnp.einsum("bmd,rde->bmre", slots, kernel)
    return spread(parts, self.reach.rate) + bias[None, None]
