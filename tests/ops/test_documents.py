import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.documents import (
  document_ids,
  interval_before,
  last_document,
)
from cached_tx.ops.fifo import Fifo, empty, push

STARTS = jnp.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], bool)


def test_documents_are_numbered_from_what_goes_on():
  want = [[0, 0, 0, 0], [1, 1, 2, 2], [0, 0, 0, 1]]
  np.testing.assert_array_equal(document_ids(STARTS), want)


def test_last_document_is_where_the_last_start_is():
  first, length = last_document(STARTS)
  np.testing.assert_array_equal(first, [0, 2, 3])
  np.testing.assert_array_equal(length, [4, 2, 1])


@pytest.mark.parametrize("slots", [0, 2, 5])
def test_the_places_before_a_document_are_those_of_its_start(slots):
  got = np.asarray(interval_before(STARTS, slots))
  none = None  # of the documents that started before
  first = [[none] * 4, [0, 0, 2, 2], [none, none, none, 3]]
  for b, token in np.ndindex(3, 4):
    start = first[b][token]
    want = set() if start is none else {slots + start - 1 - n for n in range(slots)}
    assert set(range(*got[b, token])) == want


def filled(size):
  """A queue of 10, 11, ... for each row, the oldest place not taken."""
  tokens = jnp.broadcast_to(10.0 + jnp.arange(size)[None, :, None], (3, size, 1))
  valid = jnp.broadcast_to(jnp.arange(size)[None] > 0, (3, size))
  return Fifo(jnp.where(valid[..., None], tokens, 0), valid)


def test_a_push_drops_what_is_not_of_the_last_document():
  x = jnp.broadcast_to(1.0 + jnp.arange(4)[None, :, None], (3, 4, 1))
  left, stays = push(filled(3), x, STARTS)
  np.testing.assert_array_equal(left.tokens[..., 0], [[0, 11, 12, 1], [0] * 4, [0] * 4])
  np.testing.assert_array_equal(left.valid, left.tokens[..., 0] > 0)
  np.testing.assert_array_equal(stays.tokens[..., 0], [[2, 3, 4], [0, 3, 4], [0, 0, 4]])
  np.testing.assert_array_equal(stays.valid, stays.tokens[..., 0] > 0)


def test_a_queue_longer_than_a_segment_keeps_the_rest():
  x = jnp.ones((3, 4, 1))
  left, stays = push(filled(6), x, STARTS & False)
  np.testing.assert_array_equal(left.tokens[0, :, 0], [0, 11, 12, 13])
  np.testing.assert_array_equal(stays.tokens[0, :, 0], [14, 15, 1, 1, 1, 1])
  assert not empty(2, 3, 1, jnp.float32).valid.any()
