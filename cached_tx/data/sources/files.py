"""Documents that are files, or parts of files, read when asked for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cached_tx.data.sources.base import Documents


class Piece(NamedTuple):
  """Bytes `begin` to `end` of a file."""

  file: Path
  begin: int
  end: int

  def read(self) -> bytes:
    """Returns the bytes."""
    with open(self.file, "rb") as f:
      f.seek(self.begin)
      data = f.read(self.end - self.begin)
    if len(data) != self.end - self.begin:
      raise ValueError(f"{self.file} became shorter while it was in use")
    return data


def walk(folder: Path, skip: Callable[[str], bool]) -> list[str]:
  """Returns the non-empty files below `folder`: relative paths with "/", sorted.

  Args:
    folder: where to begin; symbolic links to folders are not followed.
    skip: True for a file or folder name to leave out.
  """
  found = []
  for base, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not skip(name)]
    paths = (Path(base, name) for name in names if not skip(name))
    found += [
      path.relative_to(folder).as_posix()
      for path in paths
      if path.is_file() and path.stat().st_size
    ]
  return sorted(found)


def whole(file: Path) -> Piece:
  """Returns the piece that is the whole file."""
  return Piece(file, 0, file.stat().st_size)


def from_pieces(label: str, pieces: list[Piece]) -> Documents:
  """Returns one document per piece."""
  return Documents(label, len(pieces), lambda i: pieces[i].read())


def settle(made: Path, folder: Path):
  """Renames `made` to `folder`, unless another process was there first."""
  try:
    os.rename(made, folder)
  except OSError:
    if not folder.is_dir():
      raise
