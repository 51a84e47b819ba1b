"""Episodes that ask for what was shown: what may stand where."""

import numpy as np
import pytest

from cached_tx.data.recall import (
  ASK,
  BOS,
  CHANCE,
  KEYS,
  NOISE,
  TASKS,
  VALUES,
  VOCAB,
  episodes,
)

C, LONGEST, B = 16, 3, 12
EACH = pytest.mark.parametrize("task", TASKS)
VALUE, KEY, REST = 3, 3 + VALUES, 3 + VALUES + KEYS  # the first of each


def made(task, rows=range(B), **options):
  given = {"segment": C, "longest": LONGEST, "seed": 5, "step": 7} | options
  return episodes(task, rows, **given)


def distances(batch):
  """Of each row: segments from what is shown to the first answer."""
  return batch.weights.argmax(axis=1) // C


def is_value(tokens):
  return (tokens >= VALUE) & (tokens < KEY)


def solved(task, tokens, asked):
  """The answers of one row, read off what its first segment shows: place to value."""
  shown = tokens[1 : C // 2]
  if task != "mqar":
    values = shown[is_value(shown)]
    assert tokens[asked] == ASK
    return {asked + i: v for i, v in enumerate(values)}
  pairs = dict(zip(shown[0:-1:2], shown[1::2], strict=True))
  assert len(pairs) == len(shown) // 2
  return {asked + 2 * i: pairs[tokens[asked + 2 * i]] for i in range(len(pairs))}


@EACH
@pytest.mark.parametrize("distance", range(LONGEST + 1))
def test_the_answers_are_what_was_shown(task, distance):
  batch = made(task, distance=distance)
  tokens, targets, weights, starts = batch
  assert tokens.shape == (B, C * (LONGEST + 1)) and set(distances(batch)) == {distance}
  assert (tokens[:, 0] == BOS).all() and (starts == (tokens == BOS)).all()
  assert starts.sum() == B and tokens.max() < VOCAB == REST + NOISE
  np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
  asked = distance * C + C // 2
  for row, after, weight in zip(tokens, targets, weights, strict=True):
    answers = solved(task, row, asked)
    assert list(np.flatnonzero(weight)) == list(answers) and set(weight) == {0, 1}
    assert all(after[place] == value for place, value in answers.items())
    assert max(answers) < (distance + 1) * C  # within the segment that asks
    # Values stand where they are shown and, as answers, behind their place alone.
    places = set(np.flatnonzero(is_value(row)))
    assert {p for p in places if p >= C // 2} == {p + 1 for p in answers}


@EACH
def test_a_row_depends_on_nothing_but_its_number(task):
  few, many = made(task, range(3, 6)), made(task)
  for a, b in zip(few, many, strict=True):
    np.testing.assert_array_equal(a, b[3:6])
  assert len({row.tobytes() for row in many.tokens}) == B
  for other in ({"step": 8}, {"seed": 6}):
    assert (made(task, **other).tokens != many.tokens).any(axis=1).all()


def test_distances_are_mixed_and_values_uniform():
  batch = made("copying", range(4000))
  counts = np.bincount(distances(batch), minlength=LONGEST + 1)
  assert len(counts) == LONGEST + 1 and abs(counts / 1000 - 1).max() < 0.1
  values = batch.targets[batch.weights > 0] - VALUE
  share = np.bincount(values, minlength=VALUES) / len(values)
  assert len(share) == VALUES and abs(share - CHANCE).max() < 0.006  # 4 sigma


@pytest.mark.parametrize(
  "options,named",
  [
    ({"segment": 6}, "segment is 6"),
    ({"segment": 15}, "segment is 15"),
    ({"distance": 4}, "distance is 4, longest 3"),
    ({"distance": -1}, "distance is -1"),
    ({"longest": -1}, "longest -1"),
  ],
)
def test_what_cannot_be(options, named):
  with pytest.raises(ValueError, match=named):
    made("passkey", **options)
  with pytest.raises(ValueError, match="task 'reading' is unknown: one of copying"):
    made("reading")


def test_a_segment_is_as_long_as_its_keys_allow():
  """Pairs fill half a segment, less BOS: 16 keys, 68 tokens. Values have no end."""
  batch = made("mqar", segment=68)
  assert (batch.weights.sum(axis=1) == KEYS).all()
  with pytest.raises(ValueError, match="room for 17 keys, and there are 16"):
    made("mqar", segment=70)
  assert made("copying", segment=70).weights.sum() == B * 34
