"""Columns, numbers and units for the terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
  """Lines with columns of one width; the first `left` are flush left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return lines


def counted(count: int, noun: str) -> str:
  """A number of things: 1 document, 2,000 documents."""
  return f"{count:,} {noun}{'s' * (count != 1)}"


def size(count: int | float) -> str:
  """Bytes as people say them: 1.5 MiB."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"
