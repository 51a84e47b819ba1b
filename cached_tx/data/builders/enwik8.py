"""enwik8: the first 100,000,000 bytes of an English Wikipedia dump of 2006.

Bytes are kept as they are: newlines too are read and predicted, and bits per byte
divides by all of them. The published Transformer-XL preparation drops the newlines
and predicts one of 204 symbols. That is another task: predicting the newlines too is
reported to lower the bits per symbol by about 0.02.
"""

from cached_tx.data.builders.local import load_prepared
from cached_tx.data.builders.mahoney import OneFile
from cached_tx.data.sources.base import Documents

NEEDS_PATH = True


class LocalEnwik8(OneFile):
  """enwik8, three documents, one per split."""

  SHORT = "enwik8"
  MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
  HOMEPAGE = "http://mattmahoney.net/dc/textdata.html"
  ORIGIN = (
    "the official file is `enwik8`, unpacked from enwik8.zip of "
    "http://mattmahoney.net/dc/enwik8.zip: 100,000,000 bytes, md5 "
    f"{MD5}, sha1 57b8363b814821dc9d47aa4d41f58733519076b2"
  )


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the one document of a split of enwik8 in `path`, the file or its folder."""
  return load_prepared(LocalEnwik8, split, path, cache)
