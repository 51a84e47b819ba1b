"""Retrieval: does one paper cite the other? Bytes of pairs of AAN: Radev et al., 2009.

Read from new_aan_pairs.{train,eval,test}.tsv of the published archive: no header, five
columns separated by tabs: label (0.0 or 1.0), two names, two texts. Ids are bytes + 1;
0 is padding. As published, a text is cut at 10,000 bytes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cached_tx.data.lra.base import Example, Options, Task
from cached_tx.data.lra.text import VOCAB, byte_ids

LONGEST = 10_000  # bytes of a text
_LINE = 1 << 24  # bytes that no line has
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_FILES = {"train": "train", "validation": "eval", "test": "test"}
_PAIRS = {"train": 147_086, "validation": 18_090, "test": 17_437}  # as published


def read_pairs(file: Path, whole: int = 0) -> Iterator[Example]:
  """The pairs of a file.

  Args:
    file: of the archive.
    whole: pairs of the whole file. The last of these need not end its line; any other
      line without an end was cut off.

  Raises:
    ValueError: naming file and line.
  """
  with open(file, "rb") as lines:
    number = 0
    while line := lines.readline(_LINE):
      number += 1
      yield _pair(line, f"{file}, line {number}", number == whole)
  if not number:
    raise ValueError(f"{file} is empty")


def _pair(line: bytes, where: str, last: bool) -> Example:
  if len(line) == _LINE:
    raise ValueError(f"{where}: more than {_LINE} bytes in one line")
  if not line.endswith(b"\n") and not last:
    raise ValueError(
      f"{where}: the line is cut off (a whole one ends with a line end): {line[-40:]!r}"
    )
  columns = line.rstrip(b"\r\n").split(b"\t")
  if len(columns) != 5:
    raise ValueError(f"{where}: {len(columns)} columns; label, two names and two texts")
  if columns[0] not in _LABELS:
    raise ValueError(f"{where}: label {columns[0][:40]!r}; 0.0 or 1.0")
  for i, text in enumerate(columns[3:], 1):
    if not text:
      raise ValueError(f"{where}: text {i} is empty")
  texts = tuple(byte_ids(text[:LONGEST]) for text in columns[3:])
  return Example(texts, _LABELS[columns[0]])


def _splits(options: Options) -> dict[str, Iterable[Example]]:
  assert options.source is not None
  files = {
    split: options.source / f"new_aan_pairs.{name}.tsv"
    for split, name in _FILES.items()
  }
  for file in files.values():
    if not file.is_file():
      raise FileNotFoundError(
        f"{file} is missing: --source is the folder tsv_data of the archive, with "
        "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv"
      )
  return {split: read_pairs(file, _PAIRS[split]) for split, file in files.items()}


RETRIEVAL = Task(
  name="retrieval",
  vocab=VOCAB,
  classes=2,
  length=4000,
  source="new_aan_pairs.{train,eval,test}.tsv of tsv_data in the published archive, "
  "https://storage.googleapis.com/long-range-arena/lra_release.gz",
  splits=_splits,
  inputs=2,
  needs=True,
  official=_PAIRS,
)
