"""Relative positions of slots that do not count along with the tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cached_tx.layers.projections import ToHeads
from cached_tx.memory import partitioned
from cached_tx.ops.positions import distance_scores, distance_table
from cached_tx.types import DType


class ApartPositions(nn.Module):
  """Transformer-XL's terms of position, for slots with a table of their own.

  Slot j of M is at distance i + M - j from query i of the segment: as if it stood
  directly before it, whatever stands between. It is what the code of the Compressive
  Transformer's authors does for compressed slots.

  Attributes:
    slots: M.
    segment: C.
    heads: H.
    head_width: K.
    farthest: the distance of all that is farther too; 0: any.
    dtype: of the computation.
  """

  slots: int
  segment: int
  heads: int
  head_width: int
  farthest: int = 0
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(
    self, q: Float[Array, "B Q H K"], index: Int[Array, "#B Q"], width: int
  ) -> Float[Array, "B H Q M"]:
    """Returns what is added to the products of queries and slots.

    Args:
      q: scaled, without biases.
      index: of the queries, among the C tokens of their segment; one row of all of
        them, or one index for each row.
      width: D, of the sinusoids.
    """
    heads = (self.heads, self.head_width)
    table = distance_table(self.slots + self.segment, width, self.farthest)
    r = ToHeads(*heads, self.dtype, name="distance")(table[None])[0]  # S H K
    init = partitioned(nn.initializers.zeros, "heads", "head_width")
    bias = self.param("distance_bias", init, heads, jnp.float32)
    q = q + (bias * self.head_width**-0.5).astype(q.dtype)[None, None]
    whole = self.segment == q.shape[1] and index.shape[0] == 1
    place = None if whole else self.slots + index
    return distance_scores(q, r, place, self.slots)
