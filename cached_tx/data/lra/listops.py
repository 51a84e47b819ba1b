"""ListOps: the value of a nested expression over lists of digits.

Nangia and Bowman, 2018, arXiv:1804.06028; long expressions, as of Tay et al., 2021:

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

Expressions are made here, by the rules of the published program: an operand is, with
probability 1/4 and above the deepest level, another expression of 2 to 10 operands
under one of MIN, MAX, MED (the median, the mean of the two in the middle rounded down)
and SM (the sum modulo 10); otherwise a digit. Only expressions within a range of
lengths are kept. The published program has no seed: the distribution is its own, and
the expressions are not.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cached_tx.data.lra.base import Example, Options, Task
from cached_tx.data.lra.parallel import in_order
from cached_tx.data.sources.base import SPLITS

OPERATORS = ("[MAX", "[MED", "[MIN", "[SM")
WORDS = (*map(str, range(10)), "X", *OPERATORS)  # sorted: ids do not depend on anything
IDS = {word: i + 1 for i, word in enumerate(WORDS)}  # 0 is padding
UNKNOWN = len(WORDS) + 1
VOCAB = UNKNOWN + 1
BLOCK = 250  # expressions that one stream of random numbers makes

_END, _FIRST_OPERATOR = IDS["X"], IDS[OPERATORS[0]]
_FILES = {"train": "train", "validation": "val", "test": "test"}


class Rules(NamedTuple):
  """Which expressions are made.

  Attributes:
    deepest: levels of an expression.
    operands: at most, of one operator.
    longer: tokens that all expressions have more than,
    shorter: and fewer than. Operators and their ends count, parentheses do not.
    sizes: examples of train, validation and test.
  """

  deepest: int
  operands: int
  longer: int
  shorter: int
  sizes: tuple[int, int, int]


LONG = Rules(10, 10, 500, 2000, (96_000, 2_000, 2_000))
SMALL = Rules(5, 10, 20, 200, (20_000, 1_000, 1_000))


def grown(rules: Rules, draw: "random.Random") -> list[int] | None:
  """The ids of one expression; None of one that is too long."""
  number = draw.random
  out: list[int] = []
  left: list[int] = []  # operands that open expressions still lack
  while True:
    if len(left) + 1 < rules.deepest and number() <= 0.25:
      out.append(_FIRST_OPERATOR + int(number() * len(OPERATORS)))
      left.append(2 + int(number() * (rules.operands - 1)))
      continue
    out.append(1 + int(number() * 10))
    while left:
      left[-1] -= 1
      if left[-1]:
        break
      left.pop()
      out.append(_END)
    if not left:
      return out
    if len(out) + len(left) >= rules.shorter:
      return None


def value(ids: Iterable[int]) -> int:
  """What an expression of `grown` is worth."""
  stack: list[list[int]] = [[]]
  operators: list[int] = []
  for i in ids:
    if i >= _FIRST_OPERATOR:
      operators.append(i - _FIRST_OPERATOR)
      stack.append([])
      continue
    if i == _END:
      i = 1 + _applied(OPERATORS[operators.pop()], stack.pop())
    stack[-1].append(i - 1)
  return stack[0][0]


def whole(ids: Iterable[int]) -> bool:
  """Whether ids are one expression, whose lists are closed and have operands."""
  operands = [0]  # of the lists that are open; first the whole
  for i in ids:
    if i >= _FIRST_OPERATOR:
      operands.append(0)
      continue
    if i == _END and (len(operands) == 1 or not operands.pop()):
      return False
    operands[-1] += 1
  return operands == [1]


def _applied(operator: str, values: list[int]) -> int:
  if operator == "[MAX":
    return max(values)
  if operator == "[MIN":
    return min(values)
  if operator == "[SM":
    return sum(values) % 10
  values = sorted(values)
  middle = len(values) // 2
  if len(values) % 2:
    return values[middle]
  return (values[middle - 1] + values[middle]) // 2


def block(rules: Rules, seed: int, number: int) -> list[tuple[bytes, int]]:
  """Expressions, as bytes of ids, and their values: those of one stream of numbers."""
  draw = random.Random(f"listops {seed} {number}")
  found: list[tuple[bytes, int]] = []
  while len(found) < BLOCK:
    ids = grown(rules, draw)
    if ids is not None and rules.longer < len(ids) < rules.shorter:
      found.append((bytes(ids), value(ids)))
  return found


def generated(rules: Rules, options: Options) -> Iterator[Example]:
  """Expressions without end, no two of them equal.

  A function of rules and seed: `random.Random(text).random()` is the same in every
  version of Python, and nothing depends on the number of processes.
  """
  known: set[bytes] = set()
  make = partial(block, rules, options.seed)
  for part in in_order(make, count(), options.processes):
    for ids, answer in part:
      if ids not in known:
        known.add(ids)
        yield Example((np.frombuffer(ids, np.uint8),), answer)


def _made(rules: Rules, options: Options) -> dict[str, Iterable[Example]]:
  source = generated(rules, options)
  return {
    split: islice(source, size) for split, size in zip(SPLITS, rules.sizes, strict=True)
  }


def read_tsv(path: Path) -> Iterator[Example]:
  """The examples of a file of the published archive.

  A line has an expression with parentheses, a tab, and a digit; `]` ends a list.

  Raises:
    ValueError: naming file and line.
  """
  with open(path, encoding="utf-8", errors="replace", newline="") as file:
    header = file.readline()
    if header.rstrip("\r\n").split("\t") != ["Source", "Target"]:
      raise ValueError(
        f"{path}, line 1: {header[:60]!r} is not the header Source, Target"
      )
    for number, line in enumerate(file, 2):
      yield _parsed(line, f"{path}, line {number}")


def _parsed(line: str, where: str) -> Example:
  if not line.endswith("\n"):
    raise ValueError(f"{where}: the line is cut off: {line[-40:]!r}")
  columns = line.rstrip("\r\n").split("\t")
  if len(columns) != 2:
    raise ValueError(
      f"{where}: {len(columns)} columns; an expression, a tab and a digit"
    )
  text, label = columns
  if len(label) != 1 or label not in "0123456789":
    raise ValueError(f"{where}: label {label[:40]!r}; a digit")
  words = [word for word in text.split() if word not in ("(", ")")]
  if not words:
    raise ValueError(f"{where}: an empty expression")
  if len(words) >= LONG.shorter:
    raise ValueError(
      f"{where}: {len(words)} tokens; expressions have fewer than {LONG.shorter}, and "
      "one that is cut has no value"
    )
  strange = [word for word in words if word != "]" and (word not in IDS or word == "X")]
  if strange:
    raise ValueError(f"{where}: {strange[0][:40]!r} is no digit, operator or ]")
  ids = [IDS.get(word, _END) for word in words]  # "]" is the end
  if not whole(ids):
    raise ValueError(f"{where}: not one expression: lists are empty, or do not close")
  if value(ids) != int(label):
    raise ValueError(f"{where}: label {label}, but the expression is {value(ids)}")
  return Example((np.array(ids, np.uint8),), int(label))


def _archive(options: Options) -> dict[str, Iterable[Example]]:
  assert options.source is not None
  files = {
    split: options.source / f"basic_{name}.tsv" for split, name in _FILES.items()
  }
  for file in files.values():
    if not file.is_file():
      raise FileNotFoundError(
        f"{file} is missing: --source is the folder listops-1000 of the archive, with "
        f"basic_train.tsv, basic_val.tsv and basic_test.tsv"
      )
  return dict(_apart(files))


def _apart(files: dict[str, Path]) -> Iterator[tuple[str, Iterator[Example]]]:
  """The examples of each file, of which none may be in two."""
  known: dict[bytes, str] = {}

  def checked(file: Path) -> Iterator[Example]:
    for number, example in enumerate(read_tsv(file), 2):
      key = hashlib.sha256(example.tokens[0].tobytes()).digest()[:16]
      first = known.setdefault(key, file.name)
      if first != file.name:
        raise ValueError(f"{file}, line {number}: the expression is in {first} too")
      yield example

  for split, file in files.items():
    yield split, checked(file)


LISTOPS = Task(
  name="listops",
  vocab=VOCAB,
  classes=10,
  length=2000,
  source="made here by the published rules, seeded",
  splits=partial(_made, LONG),
  seeded=True,
  pinned={
    "train": "a6f9254e63a52875c1d3c09adec2eba499e0bea04e8e848f95f245c80e7c6d58",
    "validation": "2dcd4e17ea2d7c720538d6249c5dd75c2f3ac894fc8a505824f464cc354f6cbc",
    "test": "3597ca41d5b5ed85552abb8fd5b056ef399767431c50244e44014724b511c6c5",
  },
)
LISTOPS_SMALL = Task(
  name="listops_small",
  vocab=VOCAB,
  classes=10,
  length=200,
  source="made here: shorter expressions; not the benchmark",
  splits=partial(_made, SMALL),
  seeded=True,
  pinned={
    "train": "ef4ddb0cae5db2055e5a64eefa87f0fe4f88e50c595fa47616e413c99b780194",
    "validation": "481eacc617c8a435142f50dd6ece8302fcaf3699b88b8c1bc609577703022e91",
    "test": "be396f50e499e12add46b57f23ac8aadb53ea18aa97701c99b5377665339b84f",
  },
)
LISTOPS_ARCHIVE = Task(
  name="listops_archive",
  vocab=VOCAB,
  classes=10,
  length=2000,
  source="basic_{train,val,test}.tsv of listops-1000 in the published archive, "
  "https://storage.googleapis.com/long-range-arena/lra_release.gz",
  splits=_archive,
  needs=True,
  official=dict(zip(SPLITS, LONG.sizes, strict=True)),
)
