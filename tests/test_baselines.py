"""Baselines against definitions written out."""

import bz2
import math

import numpy as np
import pytest

from cached_tx.baselines import compressors, ngrams

RNG = np.random.default_rng(0)


def letters(count, seed):
  """A text with structure: runs of few letters."""
  rng = np.random.default_rng(seed)
  drawn = rng.choice(list(b"abc\n"), size=count, p=[0.5, 0.3, 0.15, 0.05])
  return drawn.astype(np.uint8).tobytes()


def reference(train, test, order):
  """Witten-Bell, one byte after the other."""

  def probability(history, byte, n):
    lower = 1 / 256 if n == 0 else probability(history, byte, n - 1)
    context = history[len(history) - n :]
    padded = b"\n" * 7 + train
    after = [padded[i] for i in range(7, len(padded)) if padded[i - n : i] == context]
    if not after:
      return lower
    kinds = len(set(after))
    return (after.count(byte) + kinds * lower) / (len(after) + kinds)

  padded = b"\n" * 7 + test
  bits = [
    -math.log2(probability(padded[:i], padded[i], order)) for i in range(7, len(padded))
  ]
  return sum(bits) / len(bits)


def test_ngrams_match_the_formula():
  train, test = letters(150, seed=0), letters(40, seed=1) + b"z"
  got = ngrams(train, test, (0, 1, 2, 3, 7))
  for order, bits in got.items():
    assert bits == pytest.approx(reference(train, test, order), rel=1e-12), order


def test_what_is_learned_is_the_training_text_alone():
  train = letters(2000, seed=0)
  assert ngrams(train, train[:500])[5] < ngrams(train, letters(500, seed=1))[5]
  assert ngrams(b"a", b"b" * 100, (5,))[5] > 8  # unseen, however often it comes


def test_compressors():
  test = letters(3000, seed=1)
  got = compressors(b"", test)
  assert got["bz2 -9"] == 8 * len(bz2.compress(test)) / 3000
  assert list(got) == ["gzip -9", "bz2 -9", "xz -9e", "xz, given train"]


def test_xz_reaches_back_over_the_whole_training_text():
  noise = RNG.bytes(9_000_000)  # more than the dictionary of xz -6, 8 MiB
  got = compressors(noise, noise[:10_000])
  assert got["xz -9e"] > 8 and got["xz, given train"] < 0.5


@pytest.mark.parametrize("orders", [(), (8,), (-1,)])
def test_orders_out_of_range(orders):
  with pytest.raises(ValueError, match="orders"):
    ngrams(b"a", b"a", orders)


def test_no_text():
  with pytest.raises(ValueError, match="no bits per byte"):
    compressors(b"a", b"")
  with pytest.raises(ValueError, match="no bits per byte"):
    ngrams(b"", b"a")
