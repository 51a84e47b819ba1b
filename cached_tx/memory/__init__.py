"""Memories, by kind. A new one is one file of this folder and one line here.

States are values: `save_state` and `load_state` (one file), `fork`, `Snapshots` (go
back), `pick_rows` and `stack_rows` (other batches).
"""

import dataclasses
from typing import Any

from cached_tx.memory.base import (
  Comparison,
  MemoryModule,
  Replaced,
  Slots,
  Update,
  cleared,
  partitioned,
)
from cached_tx.memory.compressive import (
  CompressiveMemory,
  CompressiveState,
  UsedState,
)
from cached_tx.memory.favor import Drawn, FavorMemory, FavorState
from cached_tx.memory.grc import GRCMemory, GRCState
from cached_tx.memory.none import NoMemory, NoState
from cached_tx.memory.saved import load_state, save_state
from cached_tx.memory.values import (
  Snapshots,
  fork,
  pick_rows,
  row_axis,
  row_count,
  stack_rows,
)
from cached_tx.memory.xl import XLMemory, XLState
from cached_tx.options import typed

KINDS: dict[str, type[MemoryModule]] = {
  "none": NoMemory,
  "xl": XLMemory,
  "compressive": CompressiveMemory,
  "grc": GRCMemory,
  "favor": FavorMemory,
}


def build_memory(kind: str, *, section: str = "memory", **options: Any) -> MemoryModule:
  """Makes a memory of a kind of the table; `section` is that of the config.

  Raises:
    ValueError: for an unknown kind, or an option that the kind does not have, or that
      is of another type.
  """
  if kind not in KINDS:
    raise ValueError(f"{section}.kind is {kind!r}; one of {', '.join(KINDS)}")
  fields = {field.name: field.type for field in dataclasses.fields(KINDS[kind])}
  known = [name for name in fields if name not in ("parent", "name")]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(
      f"{section}.{unknown[0]} is {options[unknown[0]]!r}, but the kind {kind!r} has "
      f"no such option; it has: {', '.join(known) or 'none'}. Another kind needs a "
      "section memory of its own: see configs/compare.py"
    )
  return KINDS[kind](**typed(f"{section}.", options, fields))


def kind_of(memory: MemoryModule) -> str:
  """What a config calls it: its name in `KINDS`."""
  return next(name for name, kind in KINDS.items() if type(memory) is kind)


__all__ = [
  "KINDS",
  "Comparison",
  "CompressiveMemory",
  "CompressiveState",
  "Drawn",
  "FavorMemory",
  "FavorState",
  "GRCMemory",
  "GRCState",
  "MemoryModule",
  "NoMemory",
  "NoState",
  "Replaced",
  "Slots",
  "Snapshots",
  "Update",
  "UsedState",
  "XLMemory",
  "XLState",
  "build_memory",
  "cleared",
  "fork",
  "kind_of",
  "load_state",
  "partitioned",
  "pick_rows",
  "row_axis",
  "row_count",
  "save_state",
  "stack_rows",
]
