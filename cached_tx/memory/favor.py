"""FAVOR+'s running sums as a memory: Choromanski et al., 2021, arXiv:2009.14794."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cached_tx.memory.base import MemoryModule
from cached_tx.ops.projections import project
from cached_tx.ops.sums import PrefixSums, no_sums
from cached_tx.types import DType, Index


class FavorState(NamedTuple):
  """Sums over all earlier keys of the row's document. Leaves lead with B."""

  sums: PrefixSums
  position: Index  # tokens of the document so far; wraps at 2**32, as rotary angles do


class FavorMemory(MemoryModule):
  """Remembers the whole document in sums of fixed size, without a clock.

  Attributes:
    features: R, random features per head.
    chunk: tokens per block of the scan; changes speed, not results.
    seed: of the projections, drawn for every layer as a function of (seed, layer).
  """

  features: int = 128
  chunk: int = 128
  seed: int = 0

  reader = "sums"
  clocked = False

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not fit."""
    del segment, width, heads
    if self.features < 1 or self.chunk < 1:
      raise ValueError(
        f"memory.features and memory.chunk are {self.features} and {self.chunk}; "
        "both must be 1 or more"
      )

  @nn.nowrap
  def initial_state(
    self, batch: int, width: int, heads: int, dtype: DType
  ) -> FavorState:
    """Sums over nothing."""
    sums = no_sums(batch, heads, self.features, width // heads, dtype)
    return FavorState(sums, jnp.zeros((batch,), jnp.int32))

  @nn.nowrap
  def draw(self, layer: Array | int, width: int, heads: int) -> Float[Array, "R K"]:
    """The projection of layer number `layer`. float32."""
    key = jax.random.fold_in(jax.random.key(self.seed), layer)
    return project("orthogonal", key, self.features, width // heads)
