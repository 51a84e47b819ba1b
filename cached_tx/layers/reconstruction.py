"""Attention reconstruction: Algorithm 2 of Rae et al., 2019, arXiv:1911.05507."""

from collections.abc import Callable

import jax

from cached_tx.memory import Replaced
from cached_tx.ops.attention import softmax_attention
from cached_tx.ops.compress import size_of_gap
from cached_tx.ops.documents import document_ids
from cached_tx.types import Heads, Hidden, Mask, PerRow

Project = Callable[..., Heads]


def reconstruction_loss(
  query: Project,
  key: Project,
  value: Project,
  tokens: Hidden,
  starts: Mask,
  replaced: Replaced,
) -> PerRow:
  """How far attention over the slots is from attention over what they replaced.

  Content alone, without positions, biases of Transformer-XL or a mask: for all queries
  of the row's last document and all heads, before the output projection. Gradients
  reach the new slots only. Differs from the paper's print, which writes no
  1 / sqrt(K), unless the memory asks for it: the layer attends with that factor.

  Args:
    query, key, value: the projections of the layer; frozen=True keeps gradients from
      their parameters.
    tokens: its inputs.
    starts: of documents.
    replaced: tokens and slots, and how to compare them.
  """
  how = replaced.how
  q = query(jax.lax.stop_gradient(tokens)[:, how.first :], frozen=True)
  if how.scaled:
    q = q * q.shape[-1] ** -0.5
  attend = lambda slots: softmax_attention(
    q,
    key(slots.values, frozen=True),
    value(slots.values, frozen=True),
    slots.valid[:, None],
  )
  wanted = jax.lax.stop_gradient(attend(replaced.old))
  gap = attend(replaced.new) - wanted
  documents = document_ids(starts)
  own = documents[:, how.first :] == documents[:, -1:]
  own = own & replaced.new.valid.any(axis=1)[:, None]
  return how.weight * size_of_gap(gap, own, how.norm)
