"""Results as lines of JSON, each with the program that it was measured with."""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def lines(path: Path) -> list[dict[str, Any]]:
  """The records of a JSONL file, none if it is not there."""
  return [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []


def measured_by(name: str, which: str | None) -> list[dict[str, Any]]:
  """The records of one program; with None, of the one that wrote the last record."""
  found = lines(RESULTS / name)
  return [r for r in found if r["program"] == (which or found[-1]["program"])]


def alike(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Those measured with the settings of the last: devices, and how memory is paged."""
  settings = lambda r: (r.get("devices", 1), r.get("glibc_tunables", ""))
  return [r for r in found if settings(r) == settings(found[-1])]


def append(path: Path, record: dict[str, Any]) -> None:
  """Adds a line."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write(json.dumps(record) + "\n")
