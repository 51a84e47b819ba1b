"""WikiText-103, word level: wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens.

A document is an article. An article begins at a line " = Title = " between two lines
without words; the sections inside have more signs (" = = Section = = "). Documents,
in order, are the bytes of the file, <unk> and all. With data.tokenizer="words" each
line ends in <eos> and the vocabulary has the published 267,735 words (<unk> and
<eos> among them) and BOS. Words for perplexity: those of the line and one for its
end, as in the published counts (test: 245,569).
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from cached_tx.data.builders.local import LocalText, load_prepared
from cached_tx.data.sources.base import SPLITS, Documents

NEEDS_PATH = True
PUBLISHED_VOCABULARY = 267_735

_FILES = dict(zip(SPLITS, ("train", "valid", "test"), strict=True))
_TITLE = re.compile(rb"(?m)(?:(?<=^\n)|(?<=^ \n)) = (?!= )[^\n]+ = \n(?= ?\n)")


class LocalWikitext103(LocalText):
  """WikiText-103, one document per article."""

  SHORT = "wikitext103"
  LINE_WORDS = 1
  HOMEPAGE = "https://arxiv.org/abs/1609.07843"
  ORIGIN = (
    "the official files are wiki.train.tokens, wiki.valid.tokens and "
    "wiki.test.tokens of wikitext-103-v1.zip, the word level archive of Merity et al., "
    "2016 (arXiv:1609.07843), 103,227,021, 217,646 and 245,569 words with line ends"
  )

  @classmethod
  def find(cls, path: Path) -> dict[str, list[Path]]:
    """Returns the three files of the folder."""
    found = {}
    for split, short in _FILES.items():
      file = path / f"wiki.{short}.tokens"
      if not file.is_file():
        raise cls.missing(file)
      found[split] = [file]
    return found

  def read(self, split: str) -> Iterator[bytes]:
    """Yields the articles of a split."""
    file = self.find(self.path)[split][0]
    text = file.read_bytes()
    if not text:
      raise ValueError(f"{file} is empty")
    titles = [match.start() for match in _TITLE.finditer(text)]
    if titles and not text[: titles[0]].strip():
      del titles[0]  # the empty line before it belongs to the first article
    for begin, end in pairwise([0, *titles, len(text)]):
      yield text[begin:end]


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the articles of a split of the folder `path`."""
  return load_prepared(LocalWikitext103, split, path, cache)
