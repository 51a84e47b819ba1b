import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached_tx.data import (
  Batches,
  EvaluationBatches,
  Tokens,
  TrainStream,
  evaluation_batches,
  host_rows,
  make_tokenizer,
  tokenize,
)
from cached_tx.data.streams import document_order

TEXTS = [b"first document", b"2", b"", b"the third one\n", b"and a last"]
BOS = 256


def tokens():
  return tokenize(TEXTS, make_tokenizer("bytes"))


def stream(rows=3, length=5, seed=1, **kwargs):
  return TrainStream(tokens(), rows=rows, length=length, seed=seed, **kwargs)


def circle(seed=1):
  """The circular stream, made in the plainest way."""
  ids = [[BOS, *TEXTS[i]] for i in document_order(len(TEXTS), seed)]
  return np.concatenate(ids)


def counted(lengths):
  """Tokens whose ids tell their position, so that each can be followed."""
  begins = np.cumsum([0, *lengths[:-1]])
  flat = np.arange(1, sum(lengths) + 1)
  flat[begins] = 0
  return Tokens(flat, begins, bos=0)


def side_by_side(batches):
  """The rows of all hosts as one batch."""
  return [np.concatenate(leaves) for leaves in zip(*batches, strict=True)]


def assert_same(got, want):
  for name, x, y in zip(got._fields, got, want, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y, err_msg=name)


def test_tokens():
  made = tokens()
  assert made.flat.dtype == np.uint16
  assert made.flat[made.begins].tolist() == [BOS] * 5
  assert (made.flat == BOS).sum() == 5
  assert bytes(made.flat[made.flat < BOS].astype(np.uint8)) == b"".join(TEXTS)


def test_no_documents():
  with pytest.raises(ValueError, match="no documents"):
    tokenize([], make_tokenizer("bytes"))


@given(
  rows=st.integers(1, 9),
  length=st.integers(1, 120),
  steps=st.integers(1, 30),
  seed=st.integers(0, 5),
)
def test_rows_read_the_circle_without_a_break(rows, length, steps, seed):
  batches = [stream(rows, length, seed).batch(t) for t in range(steps)]
  read = np.concatenate([batch.tokens for batch in batches], axis=1)
  targets = np.concatenate([batch.targets for batch in batches], axis=1)
  whole = circle(seed)
  for row in range(rows):
    begin = row * len(whole) // rows
    at = np.arange(begin, begin + steps * length)
    np.testing.assert_array_equal(read[row], whole[at % len(whole)])
    np.testing.assert_array_equal(targets[row], whole[(at + 1) % len(whole)])


def test_types_weights_and_starts():
  for step in range(12):
    batch = stream().batch(step)
    dtypes = [leaf.dtype for leaf in batch]
    assert dtypes == [np.int32, np.int32, np.float32, np.bool_]
    assert {leaf.shape for leaf in batch} == {(3, 5)}
    np.testing.assert_array_equal(batch.starts, batch.tokens == BOS)
    np.testing.assert_array_equal(batch.weights == 0, batch.targets == BOS)
    assert set(batch.weights.flat) <= {0, 1}


def test_starts_are_exactly_the_document_begins():
  made = counted([4, 1, 7, 3])
  read = TrainStream(made, rows=1, length=15, seed=0).batch(0)
  assert read.starts.sum() == 4
  order = document_order(4, 0)
  lengths = np.array([4, 1, 7, 3])[order]
  assert np.flatnonzero(read.starts).tolist() == [0, *np.cumsum(lengths)[:-1]]


def test_far_steps_are_exact():
  whole, step = circle(), 10**15
  batch = stream(rows=1).batch(step)
  at = (step * 5 + np.arange(5)) % len(whole)
  np.testing.assert_array_equal(batch.tokens[0], whole[at])


def test_order_is_a_fixed_permutation():
  assert document_order(8, 0).tolist() == [6, 4, 2, 1, 7, 5, 0, 3]
  assert sorted(document_order(100, 3)) == list(range(100))
  assert document_order(8, 1).tolist() != document_order(8, 0).tolist()


@pytest.mark.parametrize(("rows", "shards"), [(4, 2), (7, 3), (5, 5), (3, 1)])
def test_hosts_together_read_what_one_host_reads(rows, shards):
  parts = [stream(rows, shard=i, shards=shards) for i in range(shards)]
  for step in (0, 1, 40):
    together = side_by_side([part.batch(step) for part in parts])
    assert_same(stream(rows).batch(step), together)


def test_host_rows_are_checked():
  with pytest.raises(ValueError, match="batch=2 rows cannot be divided among 3"):
    host_rows(2, 0, 3)
  with pytest.raises(ValueError, match="shard=2"):
    host_rows(8, 2, 2)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (2, 4)])
@pytest.mark.parametrize("start", [0, 7])
def test_iteration_equals_random_access(start, threads, prefetch):
  with Batches(stream(), start=start, threads=threads, prefetch=prefetch) as batches:
    for step in range(start, start + 9):
      assert batches.step == step
      assert_same(next(batches), stream().batch(step))


def test_resumption_continues_the_iteration():
  with Batches(stream()) as whole:
    want = [next(whole) for _ in range(9)]
  with Batches(stream()) as first:
    for _ in range(5):
      next(first)
  with Batches(stream(), start=first.step) as second:
    for batch in want[5:]:
      assert_same(next(second), batch)
  second.close()


def test_wrong_arguments():
  with pytest.raises(ValueError, match="length=0"):
    stream(length=0)
  with pytest.raises(ValueError, match="length=0"):
    EvaluationBatches(tokens(), rows=1, length=0)
  with pytest.raises(ValueError, match="step=-1"):
    stream().batch(-1)
  with pytest.raises(ValueError, match="threads=1 and prefetch=0"):
    Batches(stream(), threads=1)


@given(
  lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
  rows=st.integers(1, 12),
  length=st.integers(1, 17),
)
def test_evaluation_predicts_every_token_once(lengths, rows, length):
  made = counted(lengths)
  batches = EvaluationBatches(made, rows=rows, length=length)
  seen = np.concatenate([b.targets[b.weights == 1] for b in batches])
  assert sorted(seen) == sorted(made.flat[made.flat > 0])
  assert batches.targets == len(seen)
  for batch in batches:
    real = (batch.weights == 1) & ~batch.starts  # a target follows its token
    np.testing.assert_array_equal(batch.targets[real], batch.tokens[real] + 1)
    np.testing.assert_array_equal(batch.starts, batch.tokens == 0)
  reads = np.concatenate([b.tokens[b.tokens > 0] for b in batches])
  assert sorted(reads) == sorted(seen)


def test_evaluation_lanes_are_contiguous_and_padded_at_the_end():
  batches = EvaluationBatches(counted([10, 3]), rows=2, length=4)
  read = np.concatenate([batch.tokens for batch in batches], axis=1)
  assert read.tolist() == [[0, 2, 3, 4, 5, 6, 7, 0], [8, 9, 10, 0, 12, 13, 0, 0]]
  weights = np.concatenate([batch.weights for batch in batches], axis=1)
  assert weights.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0, 0, 0]]
  assert len(batches) == 2
  assert_same(batches[-1], batches[1])
  with pytest.raises(IndexError):
    _ = batches[2]


def test_evaluation_of_bytes():
  batches = evaluation_batches(TEXTS, make_tokenizer("bytes"), rows=2, length=6)
  assert sum(batch.weights.sum() for batch in batches) == sum(map(len, TEXTS))


def test_evaluation_hosts_together_read_what_one_host_reads():
  parts = [
    EvaluationBatches(tokens(), rows=5, length=4, shard=i, shards=2) for i in range(2)
  ]
  whole = EvaluationBatches(tokens(), rows=5, length=4)
  assert {len(part) for part in parts} == {len(whole)}
  for i, batch in enumerate(whole):
    assert_same(batch, side_by_side([part[i] for part in parts]))


PROGRAM = """
import sys
from cached_tx import data

assert not {"grain", "tensorflow_datasets", "jax"} & set(sys.modules)
tokens = data.tokenize([b"some text"], data.make_tokenizer("bytes"))
stream = data.TrainStream(tokens, rows=2, length=4, seed=0)
with data.Batches(stream, threads=1, prefetch=2) as batches:
  next(batches)
assert "tensorflow" not in sys.modules
"""


def test_light_import_and_no_flags_to_parse():
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (0, "")
