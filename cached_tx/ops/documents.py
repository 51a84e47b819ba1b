"""Which tokens belong to the same document."""

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
