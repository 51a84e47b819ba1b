"""World English Bible, 4.9 MB, inside the package; a document is a book.

Split 90 / 5 / 5 by bytes, each cut moved forward to the next line start. A book
that a cut divides becomes two documents, one in each split. All documents in order,
over all splits, are the bytes of the file.
"""

import functools
import itertools
import lzma
import re
from importlib import resources

from cached_tx.data.sources.base import Documents
from cached_tx.data.sources.splits import byte_ranges

NEEDS_PATH = False

# A heading stands between two empty lines; its first chapter opens a book.
_BOOK = re.compile(rb"(?<=\n\n)[^\n]+ 1\n(?=\n)")


@functools.cache
def _text() -> bytes:
  packed = resources.files("cached_tx.data") / "text" / "web_en.txt.xz"
  return lzma.decompress(packed.read_bytes())


def _ranges(split: str) -> list[tuple[int, int]]:
  """Begin and end of each document of the split."""
  text = _text()
  begin, end = byte_ranges(len(text), lambda cut: text.index(b"\n", cut - 1) + 1)[split]
  books = [m.start() for m in _BOOK.finditer(text) if begin < m.start() < end]
  edges = [begin, *books, end]
  return list(itertools.pairwise(edges))


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the books (bytes) of a split; `path` and `cache` are not used."""
  del path, cache
  ranges = _ranges(split)
  return Documents(f"web_en {split}", len(ranges), lambda i: _text()[slice(*ranges[i])])
