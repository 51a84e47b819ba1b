"""What enwik8 and text8 share: one file of 100,000,000 bytes, one document a split.

The standard split is the first 90,000,000 bytes, the next 5,000,000 and the last
5,000,000. A file of another size is not the official one: that is logged as a
warning, and the same shares of its bytes are taken. A file of the official size with
another checksum is damaged and refused.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from cached_tx.data.builders.local import LocalText
from cached_tx.data.sources.base import SPLITS
from cached_tx.data.sources.files import Piece
from cached_tx.data.sources.splits import byte_ranges

log = logging.getLogger(__name__)

OFFICIAL_BYTES = 100_000_000


class OneFile(LocalText):
  """A single file, cut by bytes.

  Attributes:
    MD5: of the official file, unpacked.
  """

  MD5: ClassVar[str]

  @classmethod
  def find(cls, path: Path) -> dict[str, list[Path]]:
    """Returns the file itself, or the file of the data set's name in a folder."""
    file = path / cls.SHORT if path.is_dir() else path
    if not file.is_file():
      raise cls.missing(file)
    return {split: [file] for split in SPLITS}

  def read(self, split: str) -> Iterator[bytes]:
    """Yields the one document of a split."""
    file = self.find(self.path)[split][0]
    size = file.stat().st_size
    if split == SPLITS[0]:
      self._check(file, size)
    yield Piece(file, *byte_ranges(size)[split]).read()

  def _check(self, file: Path, size: int):
    if size < 20:
      raise ValueError(f"{file} has {size} bytes: too few for three splits")
    if size != OFFICIAL_BYTES:
      log.warning(
        "%s has %d bytes, the official %s %d: its splits are 90, 5 and 5 per cent of "
        "what is there, and results cannot be compared with published ones",
        *(file, size, self.SHORT, OFFICIAL_BYTES),
      )
      return
    with open(file, "rb") as f:
      found = hashlib.file_digest(f, _md5).hexdigest()
    if found != self.MD5:
      raise ValueError(
        f"{file} has the size of the official {self.SHORT} but md5 {found}, not "
        f"{self.MD5}: it is damaged. {self.ORIGIN}"
      )


def _md5():
  return hashlib.md5(usedforsecurity=False)
