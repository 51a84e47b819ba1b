"""What several attentions of encoders check and do."""

from typing import Any

from jaxtyping import Array, Bool, Float

from cached_tx.ops.favor import favor_bidirectional
from cached_tx.ops.features import FEATURES
from cached_tx.ops.projections import Rows
from cached_tx.types import Heads


def no_weights(dropout: float) -> None:
  """Raises ValueError, naming the option, if there is a rate but are no weights."""
  if dropout:
    raise ValueError(
      f"model.attention_dropout is {dropout}, but this attention makes no weights to "
      "drop: set it to 0"
    )


def check_length(tokens: int, max_len: int) -> None:
  """Raises ValueError, naming the option, if a row is longer than what was learned."""
  if tokens > max_len:
    raise ValueError(
      f"max_len is {max_len}, but there are {tokens} tokens: parameters belong to "
      "places; set max_len, in a config task.length, to the longest row"
    )


def read_by_features(
  kernel: str,
  rows: Rows | None,
  query_scale: float,
  key_scale: float,
  q: Float[Array, "B L H E"],
  k: Float[Array, "B S H E"],
  v: Float[Array, "B S H E"],
  mask: Bool[Array, "B 1 S"],
  *,
  dropout: Any = None,
) -> Heads:
  """Linear attention to a cache's slots, all of which every query sees."""
  del dropout  # there are no weights
  return favor_bidirectional(
    q * query_scale,
    k * key_scale,
    v,
    rows,
    keys=mask[:, 0],
    features=FEATURES[kernel],
  )
