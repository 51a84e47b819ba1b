"""PG-19: books of Project Gutenberg published before 1919; a document is a book.

The folder is as in the official release: train, validation and test, each with one
.txt file per book. Perplexity per word is exp(nll / words), whatever the tokenizer,
with the published words of the split (Rae et al., 2020, arXiv:1911.05507) where all
its books are there; of a part of a split, its whitespace-separated words are counted.
"""

from collections.abc import Iterator
from pathlib import Path

from cached_tx.data.builders.local import LocalText, load_prepared
from cached_tx.data.sources.base import SPLITS, Documents

NEEDS_PATH = True
BOOKS = {"train": 28_602, "validation": 50, "test": 100}


class LocalPg19(LocalText):
  """PG-19, one document per book, ordered by file name."""

  SHORT = "pg19"
  WORDS = {"train": 1_973_136_207, "validation": 3_007_061, "test": 6_966_499}  # noqa: RUF012
  HOMEPAGE = "https://github.com/google-deepmind/pg19"
  ORIGIN = (
    "the official release is the bucket gs://deepmind-gutenberg (described at "
    f"{HOMEPAGE}): folders train, validation and test with 28,602, 50 and 100 books "
    "(<id>.txt)"
  )

  @classmethod
  def find(cls, path: Path) -> dict[str, list[Path]]:
    """Returns the books of each folder."""
    found = {}
    for split in SPLITS:
      found[split] = sorted((path / split).glob("*.txt"))
      if not found[split]:
        raise cls.missing(path / split / "*.txt")
    return found

  @classmethod
  def whole(cls, split: str, files: list[Path]) -> bool:
    """Says whether all books of the official split are there, by their number."""
    return len(files) == BOOKS[split]

  def read(self, split: str) -> Iterator[bytes]:
    """Yields the books of a split."""
    for file in self.find(self.path)[split]:
      yield file.read_bytes()


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the books of a split of the folder `path`."""
  return load_prepared(LocalPg19, split, path, cache)
