"""What a task of the Long Range Arena is, and its examples once they are prepared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from cached_tx.data.sources.base import SPLITS

Tokens = Integer[np.ndarray, "L"]


class Example(NamedTuple):
  """A row to classify, or a pair of rows.

  Attributes:
    tokens: ids of the model's vocabulary, uint8 or uint16, without padding; one array
      for each row.
    label: the class.
  """

  tokens: tuple[Tokens, ...]
  label: int


class Options(NamedTuple):
  """How a task is prepared.

  Attributes:
    source: file or folder of the original data; None for data that are made.
    seed: of what is drawn: data that are made, splits that are carved out.
    processes: that work at once. The result does not depend on it.
  """

  source: Path | None = None
  seed: int = 0
  processes: int = 1


class Task(NamedTuple):
  """A task.

  Attributes:
    name: in configs and on the command line.
    vocab: ids that there are, padding included where an id stands for it.
    classes: labels that there are, from 0.
    length: the most tokens that published results read of a row.
    source: where the data come from, for people.
    splits: from options, the examples of train, validation and test, which do not
      overlap. They are read once, in order, one split after the other.
    inputs: rows of an example, 1 or 2.
    needs: whether `Options.source` must be given.
    seeded: whether `Options.seed` changes anything.
    official: examples of the splits of the original; other numbers are warned of.
    pinned: SHA-256 of splits, as of `Examples.about`, at seed 0; of data that whole
      numbers alone make, the same everywhere.
  """

  name: str
  vocab: int
  classes: int
  length: int
  source: str
  splits: Callable[[Options], dict[str, Iterable[Example]]]
  inputs: int = 1
  needs: bool = False
  seeded: bool = False
  official: Mapping[str, int] = {}
  pinned: Mapping[str, str] = {}

  @property
  def dtype(self) -> np.dtype:
    """The smallest that holds every id."""
    return np.min_scalar_type(self.vocab - 1)


class Examples(Sequence):
  """Prepared examples of a split, read when they are indexed.

  Attributes:
    label: names task and split, for messages.
    about: JSON data: "examples", "tokens", "labels" (how many examples there are of
      each class, in order), "sha256" of all of them, and "repeated" (how many of their
      rows an earlier split has too).
  """

  def __init__(self, label: str, about: dict[str, Any], read: Callable[[int], Example]):
    self.label = label
    self.about = about
    self._read = read

  def __len__(self) -> int:
    return self.about["examples"]

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self._read(i) for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f"example {index} of {len(self)} ({self.label})")
    return self._read(index % len(self))

  @property
  def majority(self) -> float:
    """The share of the most frequent class."""
    return max(self.about["labels"]) / len(self)


def check_split(split: str) -> None:
  """Raises ValueError if there is no such split."""
  if split not in SPLITS:
    raise ValueError(f"split={split!r} is unknown: one of {', '.join(SPLITS)}")


def check_example(task: Task, example: Example, where: str) -> None:
  """Raises ValueError, naming `where`, for what no example of the task can be."""
  if len(example.tokens) != task.inputs:
    raise ValueError(
      f"{where}: {len(example.tokens)} rows; an example of {task.name} has "
      f"{task.inputs}"
    )
  if not 0 <= example.label < task.classes:
    raise ValueError(
      f"{where}: label {example.label}; {task.name} has the classes 0 to "
      f"{task.classes - 1}"
    )
  for row in example.tokens:
    if not len(row):
      raise ValueError(f"{where}: an empty row")
    if int(row.max()) >= task.vocab or int(row.min()) < 0:
      raise ValueError(
        f"{where}: an id outside of 0 to {task.vocab - 1}, the vocabulary of "
        f"{task.name}"
      )
