"""FAVOR+'s running sums as a memory: Choromanski et al., 2021, arXiv:2009.14794."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from cached_tx.memory.base import MemoryModule
from cached_tx.ops.features import FEATURES, FeatureMap
from cached_tx.ops.projections import PROJECTIONS, Rows, project
from cached_tx.ops.sums import PrefixSums, no_sums
from cached_tx.types import DType, Index


class FavorState(NamedTuple):
  """Sums over all earlier keys of the row's document. Leaves lead with B."""

  sums: PrefixSums
  position: Index  # tokens of the document so far; wraps at 2**32, as rotary angles do


class FavorMemory(MemoryModule):
  """Remembers the whole document in sums of fixed size, without a clock.

  Attributes:
    features: rows of the projection, per layer; R follows from it and from `kernel`
      (twice as many for hyperbolic and trigonometric).
    kernel: what the features stand for: positive, hyperbolic or trigonometric
      features of the softmax kernel; relu, elu1 or squares as kernels of their own.
    projection: orthogonal, iid, regularised or hadamard rows; none, for kernels of
      their own alone: features of queries and keys as they are; `features`, which must
      then be left at its default, and `seed` mean nothing.
    chunk: tokens per block of the scan; changes speed, not results.
    seed: of the projections, drawn for every layer as a function of (seed, layer).
  """

  features: int = 128
  kernel: str = "positive"
  projection: str = "orthogonal"
  chunk: int = 128
  seed: int = 0

  reader = "sums"
  clocked = False

  @property
  def mapping(self) -> FeatureMap:
    """The feature map."""
    return FEATURES[self.kernel]

  @nn.nowrap
  def check(self, segment: int, width: int, heads: int) -> None:
    """Raises ValueError for values that do not fit."""
    del segment
    if self.features < 1 or self.chunk < 1:
      raise ValueError(
        f"memory.features and memory.chunk are {self.features} and {self.chunk}; "
        "both must be 1 or more"
      )
    if self.kernel not in FEATURES:
      raise ValueError(
        f"memory.kernel is {self.kernel!r}; one of {', '.join(FEATURES)}"
      )
    if self.projection not in (*PROJECTIONS, "none"):
      known = ", ".join(PROJECTIONS)
      raise ValueError(
        f"memory.projection is {self.projection!r}; one of {known} or none"
      )
    if self.projection == "none":
      if self.mapping.projected:
        raise ValueError(
          f"memory.projection is 'none', but memory.kernel {self.kernel!r} is made of "
          "random rows: choose one, or memory.kernel relu, elu1 or squares"
        )
      if self.features != type(self).features:
        raise ValueError(
          f"memory.features is {self.features}, which counts rows of a projection, but "
          f"memory.projection is 'none': leave it at {type(self).features}"
        )
    jax.eval_shape(lambda: self.draw(0, width, heads))  # what the width cannot have

  @nn.nowrap
  def initial_state(
    self, batch: int, width: int, heads: int, dtype: DType
  ) -> FavorState:
    """Sums over nothing."""
    rows = None if self.projection == "none" else self.features
    count = self.mapping.count(rows, width // heads)
    sums = no_sums(batch, heads, count, width // heads, dtype)
    return FavorState(sums, jnp.zeros((batch,), jnp.int32))

  @nn.nowrap
  def draw(self, layer: Array | int, width: int, heads: int) -> Rows | None:
    """The projection of layer number `layer`. float32."""
    if self.projection == "none":
      return None
    key = jax.random.fold_in(jax.random.key(self.seed), layer)
    return project(self.projection, key, self.features, width // heads)
