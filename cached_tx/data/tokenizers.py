"""From bytes to token ids and back. Every tokenizer has a BOS id of its own.

BOS begins every document, is never the result of encoding, and is never predicted.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from cached_tx.data.sources.base import Documents

Ids = Integer[np.ndarray, "S"]  # S ids, any integer dtype
Encoded = Int32[np.ndarray, "S"]

WINDOW = 8  # ids that are decoded together


@runtime_checkable
class Tokenizer(Protocol):
  """What a tokenizer has.

  Attributes:
    name: its key in TOKENIZERS.
    vocab: number of ids, BOS included.
    bos: the id that begins a document.
    identity: differs between tokenizers that encode differently.
  """

  name: str
  vocab: int
  bos: int
  identity: str

  def encode(self, text: bytes) -> Encoded:
    """Returns the ids of `text`, without BOS."""
    ...

  def decode(self, ids: Ids) -> bytes:
    """Returns the text of `ids`; BOS is left out."""
    ...


class Bytes:
  """Ids 0 to 255 are the bytes, 256 is BOS. decode(encode(x)) == x for any x."""

  name = identity = "bytes"
  vocab = 257
  bos = 256

  def encode(self, text: bytes) -> Encoded:
    """Returns the bytes as ids."""
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> bytes:
    """Returns the bytes, without BOS."""
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()


class Words:
  r"""Whitespace-separated words, and <eos> for each newline, as WikiText-103 has it.

  Ids are ordered by falling frequency, then by the bytes of the word; BOS is the
  last. A word outside the vocabulary becomes <unk>. decode gives back a text in the
  form of the WikiText files (" word word \n" for each line) whose words are all in
  the vocabulary; other whitespace becomes one space.
  """

  name = "words"
  eos = b"<eos>"
  unk = b"<unk>"

  def __init__(self, words: Iterable[bytes]):
    self.words = list(words)
    self._ids = {word: i for i, word in enumerate(self.words)}
    if missing := {self.eos, self.unk} - self._ids.keys():
      raise ValueError(f"a vocabulary of words needs {sorted(missing)}: data.vocab")
    self.bos = len(self.words)
    self.vocab = self.bos + 1
    digest = hashlib.sha256(b"\n".join(self.words)).hexdigest()
    self.identity = f"words-{digest[:16]}"

  @classmethod
  def from_corpus(cls, documents: Iterable[bytes]) -> "Words":
    """Returns the tokenizer of all words of `documents` (one pass)."""
    seen = Counter({cls.eos: 0, cls.unk: 0})
    for document in documents:
      seen.update(document.split())
      seen[cls.eos] += document.count(b"\n")
    return cls(sorted(seen, key=lambda word: (-seen[word], word)))

  @classmethod
  def from_file(cls, path: str | Path) -> "Words":
    """Returns the tokenizer of a file with one word per line, in the order of ids."""
    return cls(Path(path).read_bytes().splitlines())

  def save(self, path: str | Path):
    """Writes the file that `from_file` reads."""
    Path(path).write_bytes(b"".join(word + b"\n" for word in self.words))

  def encode(self, text: bytes) -> Encoded:
    """Returns the ids of the words, with <eos> for each newline."""
    unk, eos = self._ids[self.unk], self._ids[self.eos]
    ids = []
    *lines, rest = text.split(b"\n")
    for line in lines:
      ids += [self._ids.get(word, unk) for word in line.split()]
      ids.append(eos)
    ids += [self._ids.get(word, unk) for word in rest.split()]
    return np.array(ids, np.int32)

  def decode(self, ids: Ids) -> bytes:
    """Returns the words as WikiText writes them; BOS is left out."""
    eos = self._ids[self.eos]
    parts = []
    for i in np.asarray(ids):
      if i != self.bos:
        parts.append(b" \n" if i == eos else b" " + self.words[i])
    return b"".join(parts)


def _words(vocab: str, corpus: Iterable[bytes] | None) -> Words:
  if vocab:
    if not Path(vocab).is_file():
      raise FileNotFoundError(f"data.vocab={vocab!r}: no such file of words")
    return Words.from_file(vocab)
  if corpus is None:
    raise ValueError(
      "data.tokenizer='words' needs data.vocab (a file with one word per line) or the "
      "documents of the training split to build one from"
    )
  kept = None
  if isinstance(corpus, Documents) and corpus.cache is not None:
    kept = corpus.cache / f"{corpus.label}_words.txt".replace(" ", "_")
  if kept is not None and kept.exists():
    return Words.from_file(kept)
  words = Words.from_corpus(corpus)
  if kept is not None:
    # Of a folder of its own: another process may be building the same file.
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
      part = Path(folder) / kept.name
      words.save(part)
      part.replace(kept)
  return words


def _sentencepiece(vocab: str, corpus: Iterable[bytes] | None):
  del corpus
  from cached_tx.data.sentencepiece import SentencePiece

  return SentencePiece(vocab)


def _bytes(vocab: str, corpus: Iterable[bytes] | None) -> Bytes:
  del corpus
  if vocab:
    raise ValueError(f"data.vocab={vocab!r}: data.tokenizer='bytes' takes none")
  return Bytes()


TOKENIZERS = {"bytes": _bytes, "sentencepiece": _sentencepiece, "words": _words}


def make_tokenizer(
  name: str, vocab: str = "", corpus: Iterable[bytes] | None = None
) -> Tokenizer:
  """Returns a tokenizer.

  Args:
    name: "bytes", "sentencepiece" or "words".
    vocab: "sentencepiece": the model file. "words": a file with one word per line,
      or "" to build the vocabulary from `corpus`.
    corpus: the documents of the training split; read only by "words" without a
      file. The vocabulary is kept in `corpus.cache` where it has one.

  Raises:
    ValueError: unknown name, or a vocab that the tokenizer cannot use.
    FileNotFoundError: no file at `vocab`.
  """
  if name not in TOKENIZERS:
    raise ValueError(f"data.tokenizer={name!r} is unknown: {', '.join(TOKENIZERS)}")
  return TOKENIZERS[name](vocab, corpus)


def decoded(
  tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()
) -> Iterator[bytes]:
  """The text of ids as they come. A UTF-8 character may come in several pieces.

  Args:
    tokenizer: of the ids.
    ids: any; BOS has no text.
    before: what precedes them (the last few are enough): SentencePiece decodes a
      space only between pieces.
  """
  if tokenizer.name == "bytes":
    for i in ids:
      yield tokenizer.decode(np.array([i], np.int32))
    return
  recent = list(before)[-WINDOW:]
  shown = text = tokenizer.decode(np.array(recent, np.int32))
  for i in ids:
    recent.append(i)
    text = tokenizer.decode(np.array(recent, np.int32))
    if text.endswith("\ufffd".encode()) and len(recent) < 2 * WINDOW:
      continue  # bytes of a character that is not complete yet
    yield text[len(shown) :]
    recent = recent[-WINDOW:]
    shown = text = tokenizer.decode(np.array(recent, np.int32))
  yield text[len(shown) :]  # of a character that was never completed
