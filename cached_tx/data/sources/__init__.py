"""The table of data sets: a name, and where its loader is.

A loader is `load(split, path, cache) -> Documents`. It is imported when asked for,
so that no name costs the imports of another.
"""

import importlib

from cached_tx.data.sources.base import SPLITS, Documents

SOURCES = {
  "web_en": "cached_tx.data.sources.web",
  "python_stdlib": "cached_tx.data.sources.stdlib",
  "text": "cached_tx.data.sources.folder",
  "enwik8": "cached_tx.data.builders.enwik8",
  "text8": "cached_tx.data.builders.text8",
  "wikitext103": "cached_tx.data.builders.wikitext103",
  "pg19": "cached_tx.data.builders.pg19",
}


def documents(name: str, split: str, path: str = "", cache: str = "") -> Documents:
  """Returns the documents of a split, in their fixed order, read when indexed.

  Args:
    name: a key of SOURCES.
    split: "train", "validation" or "test".
    path: file or folder of local data; must be "" for data that comes with the
      package or the interpreter (web_en, python_stdlib).
    cache: folder for prepared copies of enwik8, text8, wikitext103 and pg19. "":
      the folder `.cached_tx` beside the data.

  Raises:
    ValueError: unknown name or split, a path that is missing or not wanted, or
      data that is damaged.
    FileNotFoundError: names the file, and where it officially comes from.
  """
  if name not in SOURCES:
    raise ValueError(f"data.name={name!r} is unknown: one of {', '.join(SOURCES)}")
  if split not in SPLITS:
    raise ValueError(f"split={split!r} is unknown: one of {', '.join(SPLITS)}")
  loader = importlib.import_module(SOURCES[name])
  if bool(path) != loader.NEEDS_PATH:
    rule = "needs data.path, a local file or folder" if not path else "takes no path"
    raise ValueError(f"data.path={path!r}: data.name={name!r} {rule}")
  return loader.load(split, path, cache)
