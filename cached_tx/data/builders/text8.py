"""text8: 100,000,000 bytes of Wikipedia text, lower-case letters and spaces only."""

from cached_tx.data.builders.local import load_prepared
from cached_tx.data.builders.mahoney import OneFile
from cached_tx.data.sources.base import Documents

NEEDS_PATH = True


class LocalText8(OneFile):
  """text8, three documents, one per split."""

  SHORT = "text8"
  MD5 = "3bea1919949baf155f99411df5fada7e"
  HOMEPAGE = "http://mattmahoney.net/dc/textdata.html"
  ORIGIN = (
    "the official file is `text8`, unpacked from text8.zip of "
    f"http://mattmahoney.net/dc/text8.zip: 100,000,000 bytes, md5 {MD5}"
  )


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the one document of a split of text8 in `path`, the file or its folder."""
  return load_prepared(LocalText8, split, path, cache)
