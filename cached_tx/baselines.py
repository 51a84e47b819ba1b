"""What any text is worth without a Transformer: compressors and n-grams of bytes."""

import bz2
import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, UInt64

ORDERS = (1, 2, 3, 4, 5)


def compressors(train: bytes, test: bytes) -> dict[str, float]:
  """Bits per byte of `test`, compressed.

  Args:
    train: what "xz given train" has read before: len(xz(train + test)) -
      len(xz(train)), with a dictionary that reaches back over both.
    test: at least 1 byte.
  """
  _check(test)
  both = train + test
  extreme = 9 | lzma.PRESET_EXTREME
  with ThreadPoolExecutor(2) as pool:  # compression lets other threads run
    long, short = pool.map(_xz, (both, train), (len(both), len(both)))
  sizes = {
    "gzip -9": len(gzip.compress(test, 9)),
    "bz2 -9": len(bz2.compress(test, 9)),
    "xz -9e": len(lzma.compress(test, preset=extreme)),
    "xz, given train": long - short,
  }
  return {name: 8 * size / len(test) for name, size in sizes.items()}


def _xz(text: bytes, reach: int) -> int:
  """Compressed size, with a dictionary of `reach` bytes (4 KiB to 1.5 GiB)."""
  size = min(max(reach, 1 << 12), 3 << 29)
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}]
  return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def ngrams(
  train: bytes, test: bytes, orders: tuple[int, ...] = ORDERS
) -> dict[int, float]:
  """Bits per byte of `test` under n-grams of bytes, counted in `train`.

  Order n predicts a byte from the n before it. Interpolated by Witten and Bell's rule
  with all lower orders, down to 1 / 256 for every byte: after a context seen N times
  with U different bytes,

    p_n(byte) = (count(context, byte) + U p_{n-1}(byte)) / (N + U)

  Nothing is learned from `test`. Documents stand end to end; before the first byte
  stand newlines.

  Args:
    train: at least 1 byte.
    test: at least 1 byte.
    orders: which, each from 0 to 7.

  Raises:
    ValueError: no text, or an order that 8 bytes do not hold.
  """
  _check(train)
  _check(test)
  if not orders or min(orders) < 0 or max(orders) > 7:
    raise ValueError(f"orders are {orders}; each must be from 0 to 7")
  seen, asked = _packed(train), _packed(test)
  p = np.full(len(test), 1 / 256)
  bits = {}
  for order in range(max(orders) + 1):
    p = _interpolated(seen, asked, order, p)
    if order in orders:
      bits[order] = float(-np.log2(p).mean())
  return bits


def _check(text: bytes):
  if not text:
    raise ValueError("a text without bytes has no bits per byte")


def _packed(text: bytes) -> UInt64[np.ndarray, "N"]:
  """For each byte: itself in the lowest 8 bits, its 7 predecessors above them."""
  data = np.frombuffer(b"\n" * 7 + text, np.uint8).astype(np.uint64)
  packed = np.zeros(len(text), np.uint64)
  for i in range(8):
    packed = packed << np.uint64(8) | data[i : len(data) - 7 + i]
  return packed


def _interpolated(
  seen: UInt64[np.ndarray, "N"],
  asked: UInt64[np.ndarray, "M"],
  order: int,
  lower: Float[np.ndarray, "M"],
) -> Float[np.ndarray, "M"]:
  """The probability of each byte asked, given that of the order below."""
  mask = np.uint64(256 ** (order + 1) - 1)
  pairs, counts = np.unique(seen & mask, return_counts=True)
  owner = pairs >> np.uint64(8)  # contexts, sorted as the pairs are
  first = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
  contexts = owner[first]
  totals = np.add.reduceat(counts, first)
  kinds = np.diff(np.append(first, len(owner)))

  def found(keys, values, wanted):
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)

  wanted = asked & mask
  context = wanted >> np.uint64(8)
  total = found(contexts, totals, context)
  kind = found(contexts, kinds, context)
  own = found(pairs, counts, wanted) + kind * lower
  return np.where(total > 0, own / np.maximum(total + kind, 1), lower)
