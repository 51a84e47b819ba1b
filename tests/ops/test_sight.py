import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.sight import (
  EVERYTHING,
  Grid,
  Hidden,
  Sight,
  bounds,
  ranges,
  seen,
  shown,
)

GRIDS = [
  (queries, keys, rows, columns, offset)
  for queries, keys, offset in ((8, 8, 0), (7, 12, 5), (1, 9, 8), (5, 12, 3))
  for rows, columns in ((1, 1), (3, 2), (2, 5), (16, 16))
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4])
def test_ranges_hold_what_is_seen_and_no_more(causal, window):
  for sizes in GRIDS:
    assert_ranges(Grid(*sizes, causal, window))


def assert_ranges(grid):
  whole = grid._replace(rows=grid.queries, columns=grid.keys)
  own = Hidden(EVERYTHING, None)
  shown = np.asarray(seen(whole, own, 0, 0)[0])[0]
  for i, (begin, first, last, end) in enumerate(ranges(grid, own)):
    rows = shown[i * grid.rows : (i + 1) * grid.rows]
    cut = [rows[:, j : j + grid.columns] for j in range(0, grid.keys, grid.columns)]
    some = [part.any() for part in cut]
    full = [part.all() and part.shape[1] == grid.columns for part in cut]
    assert some == [begin <= j < end for j in range(grid.wide)]
    assert full == [first <= j < last for j in range(grid.wide)]


def test_documents_and_the_mask_leave_blocks_out():
  grid = Grid(6, 8, 2, 2, 2, True, 0)
  documents = jnp.asarray([[0, 0, 0, 0, 0, 1, 2, 2]] * 2, jnp.int32)
  sight = Sight(query_documents=documents[:, 2:], key_documents=documents)
  own = Hidden(sight, None)
  got = bounds(grid, ranges(grid, own), own)
  np.testing.assert_array_equal(got, [[0, 2, 2, 2], [0, 3, 3, 3], [3, 4, 4, 4]])
  mask = np.ones((2, 6, 8), bool)
  mask[:, 2:4, :4] = mask[:, 4:] = False  # nothing is left of the last block
  own = Hidden(sight, jnp.asarray(mask))
  got = np.asarray(bounds(grid, ranges(grid, own), own))
  np.testing.assert_array_equal(got[:2], [[0, 2, 2, 2], [2, 3, 3, 3]])
  assert (got[2] == got[2, 0]).all()


def test_the_last_queries_see_their_document_up_to_themselves():
  documents = jnp.asarray([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]], jnp.int32)
  sight = Sight(query_documents=documents[:, 2:], key_documents=documents)
  got, zeros = shown(sight, 3, 5, window=2)
  assert zeros is None and got.shape == (2, 3, 5)
  for b, i, j in np.ndindex(2, 3, 5):
    near = 0 <= i + 2 - j < 2
    assert got[b, i, j] == (near and documents[b, i + 2] == documents[b, j])
