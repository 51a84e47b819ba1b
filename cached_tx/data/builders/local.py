"""What the builders share: prepare local files once, then read them as a data source.

A prepared copy is an array_record data set of TFDS in a folder whose name tells the
names, sizes and modification times of the files that it was made from, so changed
files are prepared anew. It holds the documents in order, each with its bytes.
"""

import abc
import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from cached_tx.data.sources.base import SPLITS, Documents
from cached_tx.data.sources.files import settle

log = logging.getLogger(__name__)


class LocalText(tfds.core.GeneratorBasedBuilder):
  """Documents from local files.

  Attributes:
    SHORT: the name of the data set in the table of sources.
    ORIGIN: where the files officially come from, for people.
    HOMEPAGE: an address that describes the data set.
    WORDS: published word counts by split, where perplexity per word uses them.
    LINE_WORDS: see `Documents.line_words`.
  """

  VERSION = tfds.core.Version("1.0.0")
  SHORT: ClassVar[str]
  ORIGIN: ClassVar[str]
  HOMEPAGE: ClassVar[str]
  WORDS: ClassVar[dict[str, int]] = {}
  LINE_WORDS: ClassVar[int] = 0

  def __init__(self, *, path: str | Path, **kwargs):
    """Takes the local file or folder, and what every TFDS builder takes."""
    self.path = Path(path)
    super().__init__(**kwargs)

  @classmethod
  @abc.abstractmethod
  def find(cls, path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split (the same file may serve several).

    Raises:
      FileNotFoundError: through `missing`.
    """

  @abc.abstractmethod
  def read(self, split: str) -> Iterator[bytes]:
    """Yields the documents of a split in order."""

  @classmethod
  def whole(cls, split: str, files: list[Path]) -> bool:
    """Says whether `files` are the whole official split."""
    del split, files
    return False

  @classmethod
  def missing(cls, expected: Path) -> FileNotFoundError:
    """Returns the error for a file or folder that is not there."""
    return FileNotFoundError(
      f"data.name={cls.SHORT!r} expects {expected}. It is not downloaded for you: "
      f"{cls.ORIGIN}"
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.ORIGIN}\nOne record per document, in order.",
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split):
    for i, document in enumerate(self.read(split)):
      yield i, {"text": document}


def load_prepared(
  builder: type[LocalText], split: str, path: str, cache: str
) -> Documents:
  """Returns the documents of a split; prepares them where that was not done yet.

  Args:
    builder: whose data it is.
    split: one of SPLITS.
    path: the data file or its folder.
    cache: folder for prepared copies; "": `.cached_tx` beside the data.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged.
    OSError: the cache cannot be written.
  """
  root = Path(path).expanduser()
  files = builder.find(root)
  base = root if root.is_dir() else root.parent
  folder = Path(cache).expanduser() if cache else base / ".cached_tx"
  home = folder / f"{builder.SHORT}-{_fingerprint(files)}"
  if not home.is_dir():
    _prepare(builder, root, home)
  made = builder(path=root, data_dir=home, file_format="array_record")
  source = made.as_data_source(split=split)
  whole = builder.whole(split, files[split])
  return Documents(
    f"{builder.SHORT} {split}",
    len(source),
    lambda i: source[i]["text"],
    cache=home,
    published_words=builder.WORDS[split] if whole else None,
    line_words=builder.LINE_WORDS,
  )


def _fingerprint(files: dict[str, list[Path]]) -> str:
  digest = hashlib.sha256()
  for split, paths in sorted(files.items()):
    for path in paths:
      stat = path.stat()
      digest.update(f"{split}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return digest.hexdigest()[:16]


def _prepare(builder: type[LocalText], path: Path, home: Path):
  """Writes the prepared copy aside and renames it to `home`."""
  log.info("preparing %s once: %s -> %s", builder.SHORT, path, home)
  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    home.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.TemporaryDirectory(dir=home.parent, prefix=".part-")
  except OSError as error:
    raise OSError(
      f"cannot write the prepared copy of data.path={str(path)!r} to {home.parent} "
      f"({error.strerror}): put the data into a folder that can be written, or give "
      "another cache folder"
    ) from error
  with part:
    made = Path(part.name, "made")
    writer = builder(path=path, data_dir=made, file_format="array_record")
    with contextlib.redirect_stdout(None):  # TFDS prints that it downloads
      writer.download_and_prepare(download_config=config)
    settle(made, home)
