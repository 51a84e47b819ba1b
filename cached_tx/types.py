"""Axis letters and array aliases. One letter, one meaning, but for linear attention.

B batch rows         L tokens of a call      C tokens of the clock (a segment)
M memory slots       S keys attended         T tokens of a training step
D width              H heads                 K width per head
F MLP hidden         R random features       V vocabulary
N layers of a stack  P layers of a period    G periods of a stack
Q queries of a call  W distances             A planes of rotary positions
E another width: of a cache's heads, of the other sequence of cross attention

In linear attention (ops/favor.py, sums.py, features.py, projections.py) some mean
something else, for there is neither clock nor slot nor stack:

M rows of a projection          R features, made of M rows or of K channels
T tokens of a span              C tokens of a chunk       N chunks, or spans
K1 values and a one: Kv + 1     Kv width of a value where it may differ from K
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

Tokens = Int[Array, "B L"]
Mask = Bool[Array, "B L"]
Hidden = Float[Array, "B L D"]
Heads = Float[Array, "B L H K"]
Memory = Float[Array, "B M D"]
SlotMask = Bool[Array, "B M"]
Logits = Float[Array, "B L V"]
PerRow = Float[Array, "B"]
Index = Int[Array, "B"]

Losses = dict[str, PerRow]  # summed over the row's finished segments of a call
State = Any  # a pytree of arrays; every leaf of one layer leads with B
DType = DTypeLike


class Segment(NamedTuple):
  """What a call says of its tokens besides the tokens.

  Attributes:
    starts: this token begins a new document: it and what follows see nothing
      from before it.
    valid: False for padding, which leaves no trace. None says, statically, that
      every token is real; only then may whole segments take the parallel path.
  """

  starts: Mask
  valid: Mask | None = None

  @property
  def real(self) -> Mask:
    """Which tokens are real, as an array."""
    return jnp.ones_like(self.starts) if self.valid is None else self.valid
