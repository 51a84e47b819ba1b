"""The running interpreter's own standard library: about 11 MB of Python source.

A document is a .py file; files are sorted by relative path. It is always there and
differs between Python versions, so results on it hold for one version only. Left
out: tests (folders test, tests, idle_test), installed packages (site-packages,
dist-packages) and what Python bundles for ensurepip. Split by
`splits.hashed_split` of the relative path.
"""

import sysconfig
from pathlib import Path

from cached_tx.data.sources import files
from cached_tx.data.sources.base import Documents
from cached_tx.data.sources.splits import hashed_split

NEEDS_PATH = False

_SKIP = {
  "test",
  "tests",
  "idle_test",
  "site-packages",
  "dist-packages",
  "_bundled",
  "__pycache__",
}


def load(split: str, path: str, cache: str) -> Documents:
  """Returns the files (bytes) of a split; `path` and `cache` are not used."""
  del path, cache
  folder = Path(sysconfig.get_paths()["stdlib"])
  names = [name for name in files.walk(folder, _SKIP.__contains__) if _wanted(name)]
  if not names:
    raise FileNotFoundError(
      f"no .py files in {folder}: this interpreter came without the source of its "
      "standard library; choose another data.name"
    )
  pieces = [files.whole(folder / name) for name in names if hashed_split(name) == split]
  return files.from_pieces(f"python_stdlib {split}", pieces)


def _wanted(name: str) -> bool:
  return name.endswith(".py")
