"""`text`: any file, or any folder of files, of the user's own, as bytes.

A document is a file; files are sorted by relative path; empty files, and names that
begin with a dot, are left out. The split is the first of these rules that fits:

1. a folder with sub-folders train, validation and test: those are the splits;
2. a folder of at least 200 files: by `splits.hashed_split` of the relative path, so
   that adding files never moves a file to another split;
3. otherwise the files, one after another, are cut at 90 and 95 per cent of their
   bytes, each cut moved forward to the next line start. A file that a cut divides
   becomes two documents, one in each split.
"""

from itertools import accumulate, pairwise
from pathlib import Path

from cached_tx.data.sources import files
from cached_tx.data.sources.base import SPLITS, Documents
from cached_tx.data.sources.files import Piece
from cached_tx.data.sources.splits import byte_ranges, hashed_split

NEEDS_PATH = True

# With 200 files a hashed split is empty once in 28,000 folders; with 20, in 3.
MANY_FILES = 200


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the documents of a split of `path`; `cache` is not used.

  Raises:
    FileNotFoundError: nothing at `path`.
    ValueError: the split has no bytes.
  """
  del cache
  root = Path(path).expanduser()
  if not root.exists():
    raise FileNotFoundError(f"data.path={path!r}: no such file or folder")
  pieces = _pieces(root, split)
  if not pieces:
    raise ValueError(f"data.path={path!r} has no bytes for the {split} split")
  return files.from_pieces(f"text {split}", pieces)


def _pieces(root: Path, split: str) -> list[Piece]:
  if not root.is_dir():
    return _by_bytes([root], split)
  if all((root / name).is_dir() for name in SPLITS):
    root = root / split
    return [files.whole(root / name) for name in files.walk(root, _hidden)]
  names = files.walk(root, _hidden)
  if len(names) < MANY_FILES:
    return _by_bytes([root / name for name in names], split)
  return [files.whole(root / name) for name in names if hashed_split(name) == split]


def _hidden(name: str) -> bool:
  return name.startswith(".")


def _by_bytes(paths: list[Path], split: str) -> list[Piece]:
  """The bytes of a split, of the files one after another."""
  sizes = [path.stat().st_size for path in paths]
  spans = pairwise(accumulate(sizes, initial=0))
  edges = [(path, *span) for path, span in zip(paths, spans, strict=True)]

  def next_line(cut: int) -> int:
    for path, begin, end in edges:
      if begin < cut < end:
        with open(path, "rb") as f:
          f.seek(cut - begin - 1)  # a cut at a line start stays where it is
          f.readline()
          return begin + f.tell()
    return cut

  low, high = byte_ranges(sum(sizes), next_line)[split]
  pieces = [
    Piece(path, max(low, begin) - begin, min(high, end) - begin)
    for path, begin, end in edges
  ]
  return [piece for piece in pieces if piece.begin < piece.end]
