"""Text: is a film review positive? Bytes of IMDb: Maas et al., 2011.

Read from the folder aclImdb of aclImdb_v1.tar.gz: train/pos/<number>_<rating>.txt, and
so on, 12,500 reviews in each of train/pos, train/neg, test/pos and test/neg. Ids are
bytes + 1; 0 is padding.

The published benchmark has no validation split of its own: it validates on the test
set. `text` carves one out of the training set, film by film: a film has up to 30
reviews. `text_official` does as published, and what is selected on its validation split
is selected on the test set.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16

from cached_tx.data.lra.base import Example, Options, Task

log = logging.getLogger(__name__)

VOCAB = 257
CLASSES = ("neg", "pos")
OFFICIAL = 25_000  # reviews of the training set, and of the test set
_NAME = re.compile(r"\d+_(\d+)\.txt")


def byte_ids(text: bytes) -> UInt16[np.ndarray, "L"]:
  """Bytes + 1."""
  return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(1)


class Review(NamedTuple):
  """A file.

  Attributes:
    path: relative.
    label: its class.
    film: the address of the film's reviews; "" where the set does not say.
  """

  path: str
  label: int
  film: str


def films(folder: Path, part: str, name: str) -> list[str]:
  """The films of a part and a class, by the number of the review; [] where unknown."""
  file = folder / part / f"urls_{name}.txt"
  return file.read_text("utf-8").split() if file.is_file() else []


def reviews(folder: Path, part: str) -> list[Review]:
  """The files of a part, train or test, sorted by number.

  Raises:
    FileNotFoundError: a folder is missing.
    ValueError: naming a file that does not belong where it is.
  """
  found: list[tuple[int, Review]] = []
  for label, name in enumerate(CLASSES):
    home, of = folder / part / name, films(folder, part, name)
    if not home.is_dir():
      raise FileNotFoundError(
        f"{home} is missing: --source is the folder aclImdb of aclImdb_v1.tar.gz, with "
        "train/pos, train/neg, test/pos and test/neg"
      )
    for file in home.iterdir():
      match = _NAME.fullmatch(file.name)
      if match is None:
        raise ValueError(f"{file} is no review: their names are like 123_9.txt")
      if (int(match[1]) > 5) != bool(label):
        raise ValueError(f"{file}: a rating of {match[1]} of 10 is not {name}")
      number = int(file.stem.split("_")[0])
      if of and number >= len(of):
        raise ValueError(f"{home}: urls_{name}.txt has {len(of)} lines, no {number}")
      film = of[number] if of else ""
      found.append((number, Review(f"{part}/{name}/{file.name}", label, film)))
  if len(found) != OFFICIAL:
    log.warning(
      "%s has %d reviews, the official set %d: results cannot be compared with "
      "published ones",
      folder / part,
      len(found),
      OFFICIAL,
    )
  return [review for _, review in sorted(found)]


def carved(review: Review, seed: int) -> bool:
  """Says whether a training file is in the validation split: one film in ten.

  SHA-256 of seed and film, modulo 10; of seed and relative path where no file of the
  set names films.
  """
  digest = hashlib.sha256(f"{seed} {review.film or review.path}".encode()).digest()
  return int.from_bytes(digest[:8], "big") % 10 == 0


def _read(folder: Path, files: list[Review]) -> Iterator[Example]:
  for path, label, _ in files:
    text = (folder / path).read_bytes()
    if not text:
      raise ValueError(f"{folder / path} is empty")
    yield Example((byte_ids(text),), label)


def _splits(official: bool, options: Options) -> dict[str, Iterable[Example]]:
  assert options.source is not None
  inner = options.source / "aclImdb"
  folder = inner if inner.is_dir() else options.source
  train, test = reviews(folder, "train"), reviews(folder, "test")
  validation = test
  if not official:
    if not all(review.film for review in train):
      log.warning(
        "%s has no urls_pos.txt and urls_neg.txt: reviews of one film may be in train "
        "and in validation",
        folder / "train",
      )
    validation = [file for file in train if carved(file, options.seed)]
    train = [file for file in train if not carved(file, options.seed)]
  files = {"train": train, "validation": validation, "test": test}
  return {split: _read(folder, some) for split, some in files.items()}


TEXT = Task(
  name="text",
  vocab=VOCAB,
  classes=2,
  length=4000,
  source="the folder aclImdb of https://ai.stanford.edu/~amaas/data/sentiment/"
  "aclImdb_v1.tar.gz; a tenth of the films of train is the validation split",
  splits=partial(_splits, False),
  needs=True,
  seeded=True,
)
TEXT_OFFICIAL = TEXT._replace(
  name="text_official",
  source=TEXT.source.split(";")[0]
  + "; the test set is the validation split too, as published",
  splits=partial(_splits, True),
  seeded=False,
)
