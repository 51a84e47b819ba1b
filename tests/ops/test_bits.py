import jax
import numpy as np
import pytest

from cached_tx.ops.bits import Words, kept, words


def drawn(rate, rows, keys, seed=0):
  return np.asarray(kept(words(jax.random.key(seed), rows, keys), rate))


# Of 2**20 weights; the deviation of a share is at most 4.9e-4.
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_the_share_that_stays(rate):
  got = drawn(rate, (4, 256), 1024)
  assert abs(got.mean() - (1 - rate)) < 2.5e-3
  spread = np.sqrt(rate * (1 - rate))
  for axis, count in ((2, 1024), (1, 256)):
    share = got.mean(axis=axis) - (1 - rate)
    scale = spread / np.sqrt(count)
    assert np.abs(share).max() <= 5 * scale
    assert abs(share.std() - scale) <= 0.1 * scale  # as of independent weights


def test_rates_at_both_ends():
  assert drawn(0.0, (4,), 64).all()
  assert not drawn(1 - 2**-40, (4,), 64).any()


def test_queries_and_keys_are_not_alike():
  """The correlation of any two rows or columns is what chance gives."""
  got = drawn(0.5, (512,), 512).astype(np.float64) * 2 - 1
  for x in (got, got.T):
    products = (x @ x.T / 512)[~np.eye(512, dtype=bool)]
    assert np.abs(products).max() < 6 / np.sqrt(512)
    assert abs(products.std() * np.sqrt(512) - 1) < 0.02
  # Nor are four weights at the corners of a rectangle.
  corners = got[:-1, :-1] * got[1:, :-1] * got[:-1, 1:] * got[1:, 1:]
  assert abs(corners.mean()) < 5 / 511


def test_a_block_has_the_bits_of_its_place():
  own = words(jax.random.key(1), (2, 8), 32)
  whole = np.asarray(kept(own, 0.3))
  part = kept(Words(own.rows[:, 3:6], own.columns[5:20]), 0.3)
  np.testing.assert_array_equal(part, whole[:, 3:6, 5:20])
  assert (drawn(0.3, (2, 8), 32, seed=2) != whole).any()
