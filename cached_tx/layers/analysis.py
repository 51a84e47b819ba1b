"""What layers tell of themselves to those who ask: the Flax collection ANALYSIS.

  out, found = model.apply(variables, ..., mutable=["analysis"])

Nothing of it is computed unless the collection is asked for, and then for whole
segments alone: a stream, which reads token by token, tells nothing. It holds no state.
"""

from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from cached_tx.types import PerRow

ANALYSIS = "analysis"


class Attended(NamedTuple):
  """Where the attention of a segment went. The S keys are slots, then tokens.

  Attributes:
    received: weight of each key after the softmax, without dropout; mean of heads and
      queries. Rows sum to 1, less what zero tokens before a document got.
    visible: share of the queries that could see the key.
    full: whether every slot was valid, and no document began in the segment.
  """

  received: Float[Array, "B S"]
  visible: Float[Array, "B S"]
  full: Bool[Array, "B"]


class Blended(NamedTuple):
  """How much of the output came from a cache beside the attention.

  Attributes:
    share: mean of tokens and heads; 0 for tokens that could not see the cache.
    full: whether all tokens could.
  """

  share: PerRow
  full: Bool[Array, "B"]


def asked(module: nn.Module) -> bool:
  """Whether somebody wants to know; never in a stream, whose scan hides it."""
  return module.is_mutable_collection(ANALYSIS) and not module.is_initializing()
