"""ListOps: expressions and their values, files of the archive, damaged ones."""

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pytest

from cached_tx.data.lra import TASKS, examples, listops, prepare
from cached_tx.data.lra.base import Options

HEADER = "Source\tTarget\n"


def words(ids):
  return ["]" if listops.WORDS[i - 1] == "X" else listops.WORDS[i - 1] for i in ids]


def worth(text):
  """The value of an expression, by rewriting the innermost list again and again."""
  rules = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
  }
  inner = re.compile(r"\[(MAX|MIN|MED|SM)((?: \d)+) \]")
  while not text.isdigit():
    text = inner.sub(lambda m: str(rules[m[1]](list(map(int, m[2].split())))), text)
  return int(text)


def made(rules, count, processes=1):
  return list(islice(listops.generated(rules, Options(processes=processes)), count))


def test_values_are_those_of_the_expressions():
  for example in made(listops.SMALL, 400):
    assert example.label == worth(" ".join(words(example.tokens[0])))


def test_the_distribution_is_the_published_one():
  """Of 100,000: mean length 1,035, standard deviation 394; here of 750."""
  found = made(listops.LONG, 750)
  lengths = np.array([len(e.tokens[0]) for e in found])
  assert lengths.min() > 500 and lengths.max() < 2000
  assert abs(lengths.mean() - 1035) < 4 * 394 / 750**0.5
  shares = np.bincount([e.label for e in found], minlength=10) / len(found)
  assert set(np.argsort(shares)[-2:]) == {0, 9} and 0.13 < shares.max() < 0.21
  assert len({bytes(e.tokens[0]) for e in found}) == len(found)


def test_a_seed_stands_for_its_expressions():
  """SHA-256 of the first 300, which two processes make alike."""
  digest = hashlib.sha256()
  for example in made(listops.SMALL, 300):
    digest.update(bytes(example.tokens[0]) + bytes([example.label]))
  assert digest.hexdigest()[:16] == PINNED
  other = islice(listops.generated(listops.SMALL, Options(seed=1)), 300)
  assert bytes(next(other).tokens[0]) != bytes(made(listops.SMALL, 1)[0].tokens[0])


PINNED = "109409862650e6d8"


@pytest.mark.prove
def test_processes_change_nothing():
  one, two = (made(listops.SMALL, 1200, processes=n) for n in (1, 2))
  for a, b in zip(one, two, strict=True):
    assert a.label == b.label and bytes(a.tokens[0]) == bytes(b.tokens[0])


def written(folder, lines, split="train"):
  folder.mkdir(exist_ok=True)
  for digit, name in enumerate(("train", "val", "test"), 3):
    usual = f"( ( ( [MAX 2 ) {digit} ) ] )\t{digit}\n"
    text = HEADER + (lines if name == split else usual)
    (folder / f"basic_{name}.tsv").write_text(text)
  return folder


def test_files_of_the_archive(tmp_path):
  lines = "( ( ( [MAX 1 ) 3 ) ] )\t3\n( ( ( [SM 9 ) ( ( ( [MED 4 ) 7 ) ] ) ) ] )\t4\n"
  source = written(tmp_path / "listops-1000", lines)
  counts = prepare("listops_archive", tmp_path / "out", source=source)
  assert counts == {"train": 2, "validation": 1, "test": 1}
  train = examples("listops_archive", "train", tmp_path / "out")
  assert words(train[1].tokens[0]) == ["[SM", "9", "[MED", "4", "7", "]", "]"]
  assert [e.label for e in train] == [3, 4] and train.majority == 0.5
  assert TASKS["listops_archive"].vocab == 17


BAD = {
  "( ( [MAX 2 ) ] )\t2\n( ( [MAX 2": r"basic_train.tsv, line 3: the line is cut off",
  "( ( [MAX 2 ) ] )\t12\n": "line 2: label '12'",
  "( ( [MAX 2 ) ] )\n": "line 2: 1 columns",
  "( ( [AVG 2 ) ] )\t2\n": r"line 2: '\[AVG' is no digit",
  "( ( [MAX 2 ) )\t2\n": "line 2: not one expression",
  "[MAX ]\t2\n": "line 2: not one expression",
  "2 ] [MAX 3\t2\n": "line 2: not one expression",
  "2 3\t2\n": "line 2: not one expression",
  "( ( [MAX 2 ) ] )\t3\n": "line 2: label 3, but the expression is 2",
  "( )\t2\n": "line 2: an empty expression",
}


@pytest.mark.parametrize("lines", BAD)
def test_a_damaged_file_is_named_and_leaves_nothing(lines, tmp_path):
  source = written(tmp_path / "files", lines)
  with pytest.raises(ValueError, match=BAD[lines]):
    prepare("listops_archive", tmp_path / "out", source=source)
  assert not list((tmp_path / "out").iterdir())


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"basic_train\.tsv is missing"):
    prepare("listops_archive", tmp_path, source=tmp_path)
  with pytest.raises(ValueError, match="--source"):
    prepare("listops_archive", tmp_path)
  with pytest.raises(ValueError, match="takes no files"):
    prepare("listops", tmp_path, source=tmp_path)
  with pytest.raises(ValueError, match="'lists' is unknown"):
    prepare("lists", tmp_path)
  with pytest.raises(FileNotFoundError, match="cached-tx lra prepare --task listops"):
    examples("listops", "train", tmp_path)
  with pytest.raises(ValueError, match="split='dev'"):
    examples("listops", "dev", tmp_path)


def test_an_expression_in_two_files_is_refused(tmp_path):
  lines = "( ( [MAX 4 ) ] )\t4\n( ( ( [MAX 2 ) 3 ) ] )\t3\n"
  source = written(tmp_path / "files", lines, split="test")
  match = r"basic_test\.tsv, line 3: the expression is in basic_train\.tsv too"
  with pytest.raises(ValueError, match=match):
    prepare("listops_archive", tmp_path / "out", source=source)


def test_what_a_killed_preparation_left_is_removed(tmp_path, monkeypatch):
  """But not the folder of one at work, which holds its lock."""
  left, busy = tmp_path / ".part-left", tmp_path / ".part-busy"
  for folder in (left, busy):
    folder.mkdir()
    (folder / "lock").touch()
  few = listops.LISTOPS_SMALL._replace(
    pinned={},
    splits=lambda options: listops._made(
      listops.SMALL._replace(sizes=(3, 2, 2)), options
    ),
  )
  monkeypatch.setitem(TASKS, "listops_small", few)
  with open(busy / "lock") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepare("listops_small", tmp_path, processes=1)
  assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, few.name]


WORKER = """
import os, sys, time
from cached_tx.data.lra.parallel import in_order

if __name__ == "__main__":
  for item in in_order(os.getenv, (str(i) for i in range(10**9)), 2):
    print("works", flush=True)
    time.sleep(0.01)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
  script = tmp_path / "endless.py"
  script.write_text(WORKER)
  with subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  ) as run:
    assert run.stdout.readline()
    run.kill()
    rest = threading.Thread(target=run.stdout.read)  # ends when no worker has the pipe
    rest.start()
    rest.join(30)
    alive = rest.is_alive()
    if alive:
      os.killpg(run.pid, signal.SIGKILL)
      rest.join()
  assert not alive


def test_other_data_than_elsewhere_are_refused(tmp_path, monkeypatch):
  """Another seed has no pins."""
  few = listops.SMALL._replace(sizes=(3, 2, 2))
  task = listops.LISTOPS_SMALL._replace(splits=partial(listops._made, few))
  monkeypatch.setitem(TASKS, "listops_small", task)
  with pytest.raises(ValueError, match="listops_small train was made with SHA-256"):
    prepare("listops_small", tmp_path, processes=1)
  assert not list(tmp_path.iterdir())
  prepare("listops_small", tmp_path, processes=1, seed=1)


@pytest.mark.prove
def test_the_whole_set_is_the_pinned_one(tmp_path):
  """All 100,000 and their SHA-256, made by two processes: about a minute."""
  counts = prepare("listops", tmp_path, processes=2)
  assert counts == {"train": 96_000, "validation": 2_000, "test": 2_000}
  assert examples("listops", "test", tmp_path).about["labels"][0] == 361


@dataclass
class Interrupted:
  """Examples that end in an error, as if preparation was killed."""

  count: int

  def __iter__(self):
    yield from made(listops.SMALL, self.count)
    raise KeyboardInterrupt


def test_a_preparation_that_was_stopped_leaves_nothing(tmp_path, monkeypatch):
  splits = dict.fromkeys(("train", "validation", "test"), Interrupted(20))
  broken = listops.LISTOPS_SMALL._replace(splits=lambda options: splits)
  monkeypatch.setitem(TASKS, "listops_small", broken)
  with pytest.raises(KeyboardInterrupt):
    prepare("listops_small", tmp_path, processes=1)
  assert not list(tmp_path.iterdir())


def test_what_was_prepared_otherwise_is_refused(tmp_path, monkeypatch):
  few = listops.SMALL._replace(sizes=(30, 5, 5))
  task = listops.LISTOPS_SMALL
  task = task._replace(splits=lambda options: listops._made(few, options), pinned={})
  monkeypatch.setitem(TASKS, "listops_small", task)
  counts = prepare("listops_small", tmp_path, processes=1)
  assert prepare("listops_small", tmp_path, processes=1) == counts
  with pytest.raises(ValueError, match=r"was prepared with .*'seed': 0"):
    prepare("listops_small", tmp_path, seed=1, processes=1)
  parts = [
    {bytes(e.tokens[0]) for e in examples("listops_small", split, tmp_path)}
    for split in ("train", "validation", "test")
  ]
  assert len(set.union(*parts)) == sum(map(len, parts)) == 40
