"""Prepared tasks: array_record data sets of TFDS, read without TensorFlow.

A task lies in FOLDER/NAME: the data set, and about.json, which says what it was made
of. The folder appears under its name only when it is complete.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cached_tx.data.lra.base import (
  Example,
  Examples,
  Options,
  Task,
  check_example,
  check_split,
)
from cached_tx.data.sources.base import SPLITS
from cached_tx.data.sources.files import settle

log = logging.getLogger(__name__)

ABOUT = "about.json"
PART, LOCK = ".part-", "lock"  # of what is being made
UNUSED = Options()  # for a task that is only read


class LongRangeTask(tfds.core.GeneratorBasedBuilder):
  """A task as a TFDS data set: the bytes of each row, and the label."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, task: Task, options: Options = UNUSED, **kwargs: Any):
    """Takes the task, how it is prepared, and what every TFDS builder takes."""
    self._task, self._options = task, options
    self.about: dict[str, dict[str, Any]] = {}
    self._first: dict[bytes, str] = {}  # rows, as digests, and the split they are in
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    rows = {f"tokens_{i}": tfds.features.Text() for i in range(self._task.inputs)}
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self._task.name}: {self._task.source}",
      homepage="https://arxiv.org/abs/2011.04006",
      features=tfds.features.FeaturesDict(rows | {"label": np.int64}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    made = self._task.splits(self._options)
    return {split: self._generate_examples(split, made[split]) for split in SPLITS}

  def _generate_examples(self, split, examples):
    digest, labels, tokens = hashlib.sha256(), [0] * self._task.classes, 0
    repeated = 0
    for i, example in enumerate(examples):
      check_example(self._task, example, f"example {i} of {self._task.name} {split}")
      rows = [np.asarray(row, self._task.dtype).tobytes() for row in example.tokens]
      said = b"".join(f"{len(row)} ".encode() + row for row in rows)
      own = hashlib.sha256(said).digest()[:16]
      repeated += self._first.setdefault(own, split) != split
      digest.update(said)
      digest.update(f" {example.label};".encode())
      labels[example.label] += 1
      tokens += sum(map(len, example.tokens))
      yield i, {f"tokens_{j}": r for j, r in enumerate(rows)} | {"label": example.label}
    if not sum(labels):
      raise ValueError(f"{self._task.name} {split}: no example was found")
    self.about[split] = {
      "examples": sum(labels),
      "tokens": tokens,
      "labels": labels,
      "sha256": digest.hexdigest(),
      "repeated": repeated,
    }
    if repeated:
      log.warning(
        "%s %s: %d of its %d examples are in an earlier split too",
        self._task.name, split, repeated, sum(labels),
      )  # fmt: skip
    official = self._task.official.get(split, sum(labels))
    if sum(labels) != official:
      log.warning(
        "%s %s has %d examples, the official set %d: results cannot be compared with "
        "published ones",
        self._task.name, split, sum(labels), official,
      )  # fmt: skip


def prepare_task(task: Task, folder: str | os.PathLike, options: Options) -> dict:
  """Prepares a task, if that was not done.

  Args:
    task: which.
    folder: gets a folder of the task's name.
    options: how.

  Returns:
    What about.json says: the options, and of each split as of `Examples.about`.

  Raises:
    ValueError: the task was prepared otherwise, the original data are damaged, or what
      was made is not what it is elsewhere; nothing is left behind.
    FileNotFoundError: original data are missing.
  """
  if task.needs and options.source is None:
    raise ValueError(f"{task.name} is made from local files (--source): {task.source}")
  if not task.needs and options.source is not None:
    raise ValueError(
      f"--source is {str(options.source)!r}, but {task.name} takes no files: "
      f"{task.source}"
    )
  if options.seed and not task.seeded:
    raise ValueError(
      f"--seed is {options.seed}, but {task.name} has nothing that a seed draws: leave "
      "it out"
    )
  home = Path(folder) / task.name
  wanted = _said(options)
  if home.exists():
    return _there(task, home, options)
  home.parent.mkdir(parents=True, exist_ok=True)
  _clear(home.parent)
  with (
    tempfile.TemporaryDirectory(dir=home.parent, prefix=PART) as part,
    open(Path(part, LOCK), "w") as lock,
  ):
    fcntl.flock(lock, fcntl.LOCK_EX)  # let go however this process ends
    made = Path(part, "made")
    _write(task, made, options, wanted)
    settle(made, home)
  return _there(task, home, options)  # perhaps of another process, which was first


def _there(task: Task, home: Path, options: Options) -> dict[str, Any]:
  """What about.json says, if it says what is wanted."""
  if not (home / ABOUT).is_file():
    raise ValueError(
      f"{home} is there and was not made by cached-tx lra prepare: name another folder "
      "(--out)"
    )
  about, wanted = read_about(task, home.parent), _said(options)
  if about["options"] != wanted:
    raise ValueError(
      f"{home} was prepared with {about['options']}, not with {wanted}: remove it, "
      "or name another folder (--out)"
    )
  _check_pins(task, options, about)
  return about


def _clear(folder: Path) -> None:
  """Removes what preparations left that were killed; those at work hold a lock."""
  for lock in folder.glob(f"{PART}*/{LOCK}"):
    with contextlib.suppress(OSError), open(lock) as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(lock.parent, ignore_errors=True)


def _said(options: Options) -> dict[str, Any]:
  source = options.source and os.fspath(Path(options.source).absolute())
  return {"source": source, "seed": options.seed}


def _write(task: Task, home: Path, options: Options, wanted: dict[str, Any]) -> None:
  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  writer = LongRangeTask(
    task=task, options=options, data_dir=home, file_format="array_record"
  )
  with contextlib.redirect_stdout(None):  # TFDS prints that it downloads
    writer.download_and_prepare(download_config=config)
  _check_pins(task, options, writer.about)
  about = {"task": task.name, "options": wanted, **writer.about}
  (home / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def _check_pins(task: Task, options: Options, about: dict[str, Any]) -> None:
  for split, digest in task.pinned.items():
    found = about[split]["sha256"]
    if options.seed == 0 and found != digest:
      raise ValueError(
        f"{task.name} {split} was made with SHA-256 {found}, but is {digest} elsewhere:"
        " this Python draws other numbers, and results on them could not be compared"
      )


def read_about(task: Task, folder: str | os.PathLike) -> dict[str, Any]:
  """What was written when the task was prepared.

  Raises:
    FileNotFoundError: it was not.
  """
  path = Path(folder) / task.name / ABOUT
  if not path.is_file():
    source = " --source FILES" if task.needs else ""
    raise FileNotFoundError(
      f"task.path={os.fspath(folder)!r} holds no prepared {task.name}: "
      f"cached-tx lra prepare --task {task.name} --out {os.fspath(folder)}{source}"
    )
  return json.loads(path.read_text())


def read_examples(task: Task, split: str, folder: str | os.PathLike) -> Examples:
  """The prepared examples of a split.

  Raises:
    ValueError: no such split.
    FileNotFoundError: the task was not prepared there.
  """
  check_split(split)
  about = read_about(task, folder)
  home = Path(folder) / task.name
  made = LongRangeTask(task=task, data_dir=home, file_format="array_record")
  source = made.as_data_source(split=split)
  names = [f"tokens_{i}" for i in range(task.inputs)]

  def read(index: int) -> Example:
    record = source[index]
    rows = (np.frombuffer(record[name], task.dtype) for name in names)
    return Example(tuple(rows), int(record["label"]))

  return Examples(f"{task.name} {split}", about[split], read)
