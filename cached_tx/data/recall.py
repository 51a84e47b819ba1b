"""Episodes that ask for what was shown a number of whole segments before.

An episode is one document of whole segments of C tokens, BOS first. Its first segment
shows something random in its first half; the segment `distance` later asks for it in
its second half. Values are drawn one by one, uniformly, and stand nowhere between, so
that no model without a memory of the first segment guesses better than 1 in `VALUES`
where the distance is 1 or more.

What row r of step s holds is a function of (task, seed, s, r) and of NumPy's generator.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from cached_tx.data.streams import Batch

VALUES, KEYS, NOISE = 16, 16, 16  # how many of them there are
BOS, BLANK, ASK = 0, 1, 2
FIRST_VALUE = 3
_KEY = FIRST_VALUE + VALUES
_NOISE = _KEY + KEYS
VOCAB = _NOISE + NOISE
CHANCE = 1 / VALUES  # of every answer of every task
SHORTEST = 8  # tokens of a segment

Tokens = Int64[np.ndarray, "_"]


class Episode(NamedTuple):
  """What is shown and asked.

  Attributes:
    shown: from the second token of the episode on, in the first half of a segment.
    question: tokens of the second half of a later one, answers included.
    answers: which of the question's tokens are answers; each is to be predicted from
      those before it.
  """

  shown: Tokens
  question: Tokens
  answers: np.ndarray


Task = Callable[[np.random.Generator, int], Episode]


def _values(rng: np.random.Generator, count: int) -> Tokens:
  return FIRST_VALUE + rng.integers(VALUES, size=count)


def _noise(rng: np.random.Generator, count: int) -> Tokens:
  return _NOISE + rng.integers(NOISE, size=count)


def _recited(shown: Tokens, values: Tokens) -> Episode:
  """All values asked for at once, in their order."""
  question = np.concatenate([[ASK], values])
  return Episode(shown, question, np.arange(len(question)) > 0)


def copying(rng: np.random.Generator, room: int) -> Episode:
  """`room` values, and nothing else before the question."""
  values = _values(rng, room)
  return _recited(values, values)


def selective_copying(rng: np.random.Generator, room: int) -> Episode:
  """Values at half of the places, in random ones, among noise."""
  values = _values(rng, room // 2)
  shown = _noise(rng, room)
  shown[np.sort(rng.permutation(room)[: len(values)])] = values
  return _recited(shown, values)


def passkey(rng: np.random.Generator, room: int) -> Episode:
  """One value, somewhere in noise."""
  value = _values(rng, 1)
  shown = _noise(rng, room)
  shown[rng.integers(room)] = value[0]
  return _recited(shown, value)


def associative_recall(rng: np.random.Generator, room: int) -> Episode:
  """Keys with a value each; every key is asked for, in another order (MQAR)."""
  count = room // 2
  if count > KEYS:
    raise ValueError(
      f"half a segment has room for {count} keys, and there are {KEYS}: the task mqar "
      "takes a shorter segment"
    )
  keys = _KEY + rng.permutation(KEYS)[:count]
  values = _values(rng, count)
  pairs = np.stack([keys, values], axis=1)
  question = pairs[rng.permutation(count)].reshape(-1)
  return Episode(pairs.reshape(-1), question, np.arange(2 * count) % 2 == 1)


TASKS: dict[str, Task] = {
  "copying": copying,
  "selective": selective_copying,
  "mqar": associative_recall,
  "passkey": passkey,
}
SILENT = ("copying",)  # tasks with blanks where the others have noise


def episodes(
  task: str,
  rows: Sequence[int],
  *,
  segment: int,
  longest: int,
  seed: int,
  step: int,
  distance: int | None = None,
) -> Batch:
  """The episodes of some rows of a step.

  Args:
    task: a key of TASKS.
    rows: their numbers; a row does not depend on which others there are.
    segment: C, even.
    longest: largest distance.
    seed: from 0.
    step: from 0.
    distance: of all rows; None: uniform from 0 to `longest`, for each row its own.

  Returns:
    B rows of C (longest + 1) tokens; weights are 1 where the target is an answer, else
    0.

  Raises:
    ValueError: an unknown task, a number out of its range, or a segment that shows more
      keys than the task has.
  """
  if task not in TASKS:
    raise ValueError(f"task {task!r} is unknown: one of {', '.join(TASKS)}")
  if segment < SHORTEST or segment % 2:
    raise ValueError(
      f"segment is {segment}; one half shows and one asks: even, {SHORTEST} or more"
    )
  if longest < 0 or not 0 <= (distance or 0) <= longest:
    raise ValueError(f"distance is {distance}, longest {longest}: 0 to longest")
  parts = [_row(task, row, segment, longest, seed, step, distance) for row in rows]
  tokens, weights = (np.stack(part) for part in zip(*parts, strict=True))
  tokens = tokens.astype(np.int32)
  now, after = tokens[:, :-1].copy(), tokens[:, 1:].copy()
  return Batch(now, after, weights[:, 1:].astype(np.float32), now == BOS)


def _row(
  task: str,
  row: int,
  segment: int,
  longest: int,
  seed: int,
  step: int,
  distance: int | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens, one more than the episode has; which are answers."""
  rng = np.random.default_rng([zlib.crc32(task.encode()), seed, step, row])
  drawn = int(rng.integers(longest + 1))
  distance = drawn if distance is None else distance
  length = segment * (longest + 1) + 1
  tokens = np.full(length, BLANK) if task in SILENT else _noise(rng, length)
  shown, question, answers = TASKS[task](rng, segment // 2 - 1)
  tokens[0] = BOS
  tokens[1 : 1 + len(shown)] = shown
  asked = distance * segment + segment // 2
  tokens[asked : asked + len(question)] = question
  weights = np.zeros(length)
  weights[asked : asked + len(question)] = answers
  return tokens, weights
