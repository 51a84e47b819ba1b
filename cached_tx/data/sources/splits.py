"""Rules that divide data without an official split into 90 / 5 / 5 per cent."""

import hashlib
from collections.abc import Callable
from itertools import pairwise

from cached_tx.data.sources.base import SPLITS

_PERCENT = (0, 90, 95, 100)  # where train, validation and test begin, and the end


def byte_ranges(
  size: int, forward: Callable[[int], int] = lambda cut: cut
) -> dict[str, tuple[int, int]]:
  """Returns begin and end of each split in `size` bytes; the last 5 % is the test.

  Args:
    size: bytes.
    forward: moves a cut to where it may fall, at or after the exact one.
  """
  first, second = (forward(size * percent // 100) for percent in _PERCENT[1:3])
  ranges = pairwise((0, first, second, size))
  return dict(zip(SPLITS, ranges, strict=True))


def hashed_split(path: str) -> str:
  """Returns the split of a file, by its relative path (with "/") alone.

  SHA-256 of the path modulo 100: 0-89 train, 90-94 validation, 95-99 test. Files
  that come or go leave the split of the others as it was.
  """
  bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
  return SPLITS[sum(bucket >= percent for percent in _PERCENT[1:3])]
