"""A run goes on with the data it began with."""

import numpy as np
import pytest

from cached_tx.data import Tokens
from cached_tx.train import same_data
from cached_tx.train.same_data import check_data, identity


def tokens(change=None, begins=(0, 700)):
  flat = (np.arange(1000) % 251).astype(np.uint16)
  if change is not None:
    flat[change] += 1
  return Tokens(flat, np.array(begins, np.int64), 256)


def test_the_same_data_is_the_same():
  check_data(identity(tokens()), identity(tokens()))
  check_data(None, identity(tokens()))


@pytest.mark.parametrize("other", [tokens(999), tokens(begins=(0, 701))])
def test_other_data_is_refused(other):
  with pytest.raises(ValueError, match=r"1,000 tokens in 2 documents.*data\.path"):
    check_data(identity(tokens()), identity(other))


def test_a_huge_array_is_sampled(monkeypatch):
  monkeypatch.setattr(same_data, "LARGEST", 100)
  monkeypatch.setattr(same_data, "_BLOCK", 8)
  monkeypatch.setattr(same_data, "_BLOCKS", 3)
  want = identity(tokens())
  assert want["hashed"] == "sample" and want["tokens"] == 1000
  assert identity(tokens(999)) != want and identity(tokens(0)) != want
  assert identity(tokens(100)) == want  # between two blocks
