"""Memories, by kind. A new one is one file of this folder and one line here."""

from typing import Any

from cached_tx.memory.base import (
  Comparison,
  MemoryModule,
  Replaced,
  Slots,
  Update,
  partitioned,
)
from cached_tx.memory.compressive import (
  CompressiveMemory,
  CompressiveState,
  UsedState,
)
from cached_tx.memory.favor import FavorMemory, FavorState
from cached_tx.memory.grc import GRCMemory, GRCState
from cached_tx.memory.none import NoMemory, NoState
from cached_tx.memory.xl import XLMemory, XLState

KINDS: dict[str, type[MemoryModule]] = {
  "none": NoMemory,
  "xl": XLMemory,
  "compressive": CompressiveMemory,
  "grc": GRCMemory,
  "favor": FavorMemory,
}


def build_memory(kind: str, **options: Any) -> MemoryModule:
  """Makes a memory of a kind of the table.

  Raises:
    ValueError: for an unknown kind, or an option that the kind does not have.
  """
  if kind not in KINDS:
    raise ValueError(f"memory.kind is {kind!r}; one of {', '.join(KINDS)}")
  fields = KINDS[kind].__dataclass_fields__
  known = [name for name in fields if name not in ("parent", "name")]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(
      f"memory.{unknown[0]} is no option of the kind {kind!r}, which has: "
      + (", ".join(known) or "none")
    )
  return KINDS[kind](**options)


__all__ = [
  "KINDS",
  "Comparison",
  "CompressiveMemory",
  "CompressiveState",
  "FavorMemory",
  "FavorState",
  "GRCMemory",
  "GRCState",
  "MemoryModule",
  "NoMemory",
  "NoState",
  "Replaced",
  "Slots",
  "Update",
  "UsedState",
  "XLMemory",
  "XLState",
  "build_memory",
  "partitioned",
]
