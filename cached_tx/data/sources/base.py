"""What every source returns, and what can be counted in it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation", "test")


class Counts(NamedTuple):
  """Sizes of a split: the denominators of bits per byte and perplexity per word.

  Attributes:
    documents: number of documents.
    bytes: of all documents together, without BOS tokens.
    words: see `rule`.
    rule: how words were counted.
  """

  documents: int
  bytes: int
  words: int
  rule: str


class Documents(Sequence):
  """A lazy sequence of documents, each of type bytes.

  Attributes:
    label: names data set and split, for messages and cache files.
    cache: a folder that belongs to exactly this data, for files derived from it,
      or None.
    published_words: the published word count of the whole split, where `self` is
      the whole split and one was published; otherwise None.
    line_words: words that every line has besides its whitespace-separated ones
      (1 where the end of a line is predicted as a word).
  """

  def __init__(
    self,
    label: str,
    length: int,
    read: Callable[[int], bytes],
    *,
    cache: Path | None = None,
    published_words: int | None = None,
    line_words: int = 0,
  ):
    self.label = label
    self.cache = cache
    self.published_words = published_words
    self.line_words = line_words
    self._length = length
    self._read = read

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self._read(i) for i in range(*index.indices(self._length))]
    if not -self._length <= index < self._length:
      raise IndexError(f"document {index} of {self._length} ({self.label})")
    return self._read(index % self._length)


def counts(documents: Documents) -> Counts:
  """Reads all documents once and counts bytes and words.

  Perplexity per word is exp(nll in nats / words), whatever the tokenizer: the
  published word count where the split is whole and has one (PG-19), otherwise the
  whitespace-separated words found, plus one per line where line ends are words
  (WikiText-103, whose published counts include <eos>).
  """
  size, words = 0, 0
  for document in documents:
    size += len(document)
    if documents.published_words is None:
      words += len(document.split())
      words += documents.line_words * document.count(b"\n")
  rule = "whitespace-separated words" + (", line ends" if documents.line_words else "")
  if documents.published_words is not None:
    words, rule = documents.published_words, "published for the whole split"
  return Counts(len(documents), size, words, rule)
