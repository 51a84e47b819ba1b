"""The position-wise network of a block."""

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.projections import kernel_init
from cached_tx.types import DType, Hidden


class MLP(nn.Module):
  """Dense, GELU (tanh form), Dense.

  Attributes:
    hidden: F.
    output_scale: variance of the second kernel, relative to 1 / fan-in.
    dropout: rate on the output.
    dtype: of the computation. Parameters are float32.
  """

  hidden: int
  output_scale: float = 1.0
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Hidden, *, deterministic: bool = True) -> Hidden:
    """Returns B L D."""
    D = x.shape[-1]
    h = nn.Dense(
      self.hidden,
      dtype=self.dtype,
      kernel_init=kernel_init(1.0, 1, ("embed", "mlp")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("mlp",)),
      name="up",
    )(x)
    y = nn.Dense(
      D,
      dtype=self.dtype,
      kernel_init=kernel_init(self.output_scale, 1, ("mlp", "embed")),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
      name="down",
    )(nn.gelu(h))
    return nn.Dropout(self.dropout)(y, deterministic=deterministic)
