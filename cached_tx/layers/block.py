"""A block: attention with memory, then MLP, and where their norms stand."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.mlp import MLP
from cached_tx.memory import partitioned
from cached_tx.types import DType, Hidden, Losses, Segment, State

NORMS = ("pre", "pre_raw", "post")


def layer_norm(
  dtype: DType, epsilon: float = 1e-5, bias: bool = False, **options: Any
) -> nn.LayerNorm:
  """The norm of blocks and of the last hidden state; options as of `nn.LayerNorm`."""
  return nn.LayerNorm(
    dtype=dtype,
    epsilon=epsilon,
    use_bias=bias,
    scale_init=partitioned(nn.initializers.ones, "embed"),
    bias_init=partitioned(nn.initializers.zeros, "embed"),
    **options,
  )


class Block(nn.Module):
  """Attention, then MLP, each beside a residual connection.

  Attributes:
    attention: a layer with a memory.
    mlp: the position-wise network.
    dtype: of the computation.
    norm: pre: x + attention(norm(x)), then x + MLP(norm(x)); the memory holds the
      normed inputs of its attention, as in the code of the Compressive Transformer's
      authors. pre_raw: the same, but the attention norms x and its memory, which holds
      x, whenever it reads them, as in Transformer-XL's code (pre_lnorm): gradients
      reach the norm through the memory too. post: norm(x + attention(x)), then
      norm(x + MLP(x)), as both papers.
    norm_bias: whether norms have a bias.
    norm_epsilon: added to the variance.
  """

  attention: MemoryAttention
  mlp: MLP
  dtype: DType = jnp.float32
  norm: str = "pre"
  norm_bias: bool = False
  norm_epsilon: float = 1e-5

  def setup(self) -> None:
    """Makes the norms."""
    norm = lambda: layer_norm(self.dtype, self.norm_epsilon, self.norm_bias)
    self.mlp_norm = norm()
    if self.norm != "pre_raw":
      self.attention_norm = norm()

  def __call__(
    self,
    x: Hidden,
    state: State,
    segment: Segment,
    *,
    draw: Any = None,
    deterministic: bool = True,
  ) -> tuple[Hidden, State, Losses]:
    """Arguments and results as of `MemoryAttention`; at padding, y means nothing."""
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    own = self.attention_norm(x) if self.norm == "pre" else x
    y, state, losses = self.attention(
      own, state, segment, draw=draw, deterministic=deterministic
    )
    x = x + y
    if self.norm == "post":
      x = self.attention_norm(x)
      x = self.mlp_norm(x + self.mlp(x, deterministic=deterministic))
      return x, state, losses
    x = x + self.mlp(self.mlp_norm(x), deterministic=deterministic)
    return x, state, losses
