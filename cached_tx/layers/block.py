"""A pre-norm block: attention with memory, then MLP."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.mlp import MLP
from cached_tx.memory import partitioned
from cached_tx.types import DType, Hidden, Losses, Segment, State


class Block(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)).

  The memory holds the normed inputs of its attention, as in the code of the
  Compressive Transformer's authors.

  Attributes:
    attention: a layer with a memory.
    mlp: the position-wise network.
    dtype: of the computation.
  """

  attention: MemoryAttention
  mlp: MLP
  dtype: DType = jnp.float32

  def setup(self) -> None:
    """Makes the norms."""
    init = partitioned(nn.initializers.ones, "embed")
    norm = lambda: nn.LayerNorm(
      dtype=self.dtype, epsilon=1e-5, use_bias=False, scale_init=init
    )
    self.attention_norm, self.mlp_norm = norm(), norm()

  def __call__(
    self,
    x: Hidden,
    state: State,
    segment: Segment,
    *,
    draw: Any = None,
    deterministic: bool = True,
  ) -> tuple[Hidden, State, Losses]:
    """Arguments and results as of `MemoryAttention`."""
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    y, state, losses = self.attention(
      self.attention_norm(x), state, segment, draw=draw, deterministic=deterministic
    )
    x = x + y
    x = x + self.mlp(self.mlp_norm(x), deterministic=deterministic)
    return x, state, losses
