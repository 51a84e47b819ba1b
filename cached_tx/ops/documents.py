"""Which tokens belong to the same document."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cached_tx.types import Index, Mask


def document_ids(starts: Mask) -> Int[Array, "B L"]:
  """Numbers the documents of a segment: 0 goes on from before, 1 starts here, ..."""
  return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def last_document(starts: Mask) -> tuple[Index, Index]:
  """First index and length, in tokens, of each row's last document (int32)."""
  L = starts.shape[1]
  places = jnp.where(starts, jnp.arange(L, dtype=jnp.int32)[None], 0)
  first = jnp.max(places, axis=1)
  return first, L - first


def causal_mask(
  documents: Int[Array, "B L"],
  index: Int[Array, "#B Q"],
  query_documents: Int[Array, "B Q"],
) -> Bool[Array, "B Q L"]:
  """True where a query at `index` may see a token: not later, same document."""
  L = documents.shape[1]
  earlier = jnp.arange(L, dtype=index.dtype)[None, None] <= index[:, :, None]
  return earlier & (documents[:, None] == query_documents[:, :, None])


def places_before(
  starts: Mask, index: Int[Array, "#B Q"], slots: int
) -> Bool[Array, "B Q S"]:
  """True at the M places before the document of a query, if it starts in this segment.

  Args:
    starts: of the L tokens of the segment.
    index: of the queries, among those tokens.
    slots: M, how many columns stand before the segment's own: S = M + L.
  """
  B, L = starts.shape
  index = jnp.broadcast_to(index, (B, index.shape[1]))
  intervals = interval_before(starts, slots)
  intervals = jnp.take_along_axis(intervals, index[..., None], axis=1)  # B Q 2
  columns = jnp.arange(slots + L, dtype=jnp.int32)[None, None]
  return (columns >= intervals[..., :1]) & (columns < intervals[..., 1:])


def interval_before(starts: Mask, slots: int) -> Int[Array, "B L 2"]:
  """Of each token the columns, first and past the last, of `places_before`."""
  places = jnp.arange(starts.shape[1], dtype=jnp.int32)[None]
  latest = jax.lax.cummax(jnp.where(starts, places, -1), axis=1)
  last = jnp.where(latest >= 0, latest + slots, -1)
  return jnp.stack([latest, last], axis=-1)
