"""A queue of a row's latest tokens."""

from typing import NamedTuple

import jax.numpy as jnp

from cached_tx.ops.documents import document_ids
from cached_tx.types import DType, Hidden, Mask, Memory, SlotMask


class Fifo(NamedTuple):
  """M tokens, oldest first. Leaves lead with B."""

  tokens: Memory  # 0 where not valid
  valid: SlotMask

  def cleared(self) -> "Fifo":
    """The queue with 0 at the places that are not taken, whatever stands there."""
    return Fifo(jnp.where(self.valid[..., None], self.tokens, 0), self.valid)


def empty(batch: int, size: int, width: int, dtype: DType) -> Fifo:
  """A queue of M = `size` places, none of them taken."""
  return Fifo(jnp.zeros((batch, size, width), dtype), jnp.zeros((batch, size), bool))


def push(queue: Fifo, x: Hidden, starts: Mask) -> tuple[Fifo, Fifo]:
  """Appends the L tokens of a segment and drops all but the row's last document.

  Returns:
    The L oldest of the M + L tokens, which leave, and the M newest, which stay.
  """
  L = x.shape[1]
  documents = document_ids(starts)
  own = documents == documents[:, -1:]
  kept = queue.valid & (documents[:, -1:] == 0)  # no start: the document goes on
  valid = jnp.concatenate([kept, own], axis=1)
  tokens = jnp.concatenate([queue.tokens, x.astype(queue.tokens.dtype)], axis=1)
  tokens = jnp.where(valid[..., None], tokens, 0)
  return Fifo(tokens[:, :L], valid[:, :L]), Fifo(tokens[:, L:], valid[:, L:])
