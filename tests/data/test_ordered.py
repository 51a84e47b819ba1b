"""Lanes as Transformer-XL's own code cuts them."""

import numpy as np
import pytest

from cached_tx.data import OrderedBatches, Tokens
from tests.official_xl import load


@pytest.mark.parametrize("name", ["even", "ragged", "short_tail"])
def test_equals_the_official_iterator(name):
  _, arrays = load("b_data_iter_and_masks")
  size, rows, length = map(int, arrays[f"{name}/args_n_bsz_bptt"])
  tokens = Tokens(np.arange(size), np.zeros(1, np.int64), size)
  batches = OrderedBatches(tokens, rows=rows, length=length)
  assert len(batches) == int(arrays[f"{name}/n_batches"])
  count = 0
  for i, batch in enumerate(batches):
    inputs, targets = (
      arrays[f"{name}/batch{i}/{kind}_TB"].T for kind in ("inp", "tgt")
    )
    real = inputs.shape[1]
    assert batch.tokens.shape == (rows, length) and not batch.starts[:, :real].any()
    np.testing.assert_array_equal(batch.tokens[:, :real], inputs)
    np.testing.assert_array_equal(batch.targets[:, :real], targets)
    assert (batch.weights[:, :real] == 1).all() and not batch.weights[:, real:].any()
    assert (batch.tokens[:, real:] == size).all() and batch.starts[:, real:].all()
    count += targets.size
  assert batches.targets == count
  assert (real < length) == (name == "even")


def test_documents_are_one_text():
  flat = np.array([9, 1, 2, 3, 9, 4, 9, 5, 6, 7, 8])
  tokens = Tokens(flat, np.array([0, 4, 6]), 9)
  (batch,) = OrderedBatches(tokens, rows=2, length=4)
  np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 9], [5, 6, 7, 9]])
  np.testing.assert_array_equal(batch.targets, [[2, 3, 4, 9], [6, 7, 8, 9]])
  np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 0]] * 2)


def test_hosts_together_read_what_one_host_reads():
  tokens = Tokens(np.arange(31), np.zeros(1, np.int64), 31)
  whole = OrderedBatches(tokens, rows=4, length=3)
  parts = [OrderedBatches(tokens, rows=4, length=3, shard=i, shards=2) for i in (0, 1)]
  assert {part.targets for part in parts} == {whole.targets}
  for i in range(-1, len(whole)):
    both = [np.concatenate(own) for own in zip(*(p[i] for p in parts), strict=True)]
    for leaf, own in zip(whole[i], both, strict=True):
      np.testing.assert_array_equal(leaf, own)


def test_wrong_arguments():
  tokens = Tokens(np.arange(9), np.zeros(1, np.int64), 9)
  with pytest.raises(ValueError, match=r"rows=5 lanes of a text of 9 tokens have 1"):
    OrderedBatches(tokens, rows=5, length=3)
  with pytest.raises(ValueError, match="length=0"):
    OrderedBatches(tokens, rows=1, length=0)
  with pytest.raises(IndexError):
    OrderedBatches(tokens, rows=1, length=3)[3]
