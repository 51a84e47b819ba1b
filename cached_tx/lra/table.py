"""Finished runs as the paper's tables: Markdown, CSV and plots."""

import csv
import io
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cached_tx.files import write_atomically
from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.lra import published
from cached_tx.lra.training import RESULT
from cached_tx.tables import counted

# Runs that differ in one of these are not seeds of each other.
KEYS = (
  "task", "model", "cached", "layers", "length", "steps", "batch", "parameters",
  "settings", "data",
)  # fmt: skip
Key = tuple[Any, ...]


def results(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """What `evaluate` left in the runs of a folder, at any depth, by path.

  Args:
    folder: of runs; or a file of such records, one a line.

  Raises:
    FileNotFoundError: there is none.
    ValueError: a file is no result; names it.
  """
  found = []
  for where, run, text in _texts(Path(folder)):
    try:
      record = json.loads(text)
      found.append({"run": run} | record)
      _key(record)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
      raise ValueError(f"{where} is no result of a run: {error!r}") from None
  if not found:
    raise FileNotFoundError(
      f"no {RESULT} below {os.fspath(folder)}: cached-tx lra evaluate writes one in "
      "the folder of a finished run"
    )
  return found


def _texts(place: Path) -> Iterator[tuple[str, str, str]]:
  """Where each record is, the run that it is of, and its text."""
  if place.is_file():
    for number, line in enumerate(place.read_text().splitlines(), 1):
      where = f"{place}, line {number}"
      yield where, where, line
    return
  for path in sorted(place.rglob(RESULT)):
    yield str(path), str(path.parent), path.read_text()


def _key(record: dict[str, Any]) -> Key:
  return tuple(record[name] for name in KEYS)


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row for all seeds of what is otherwise the same run, on the same data.

  Returns:
    Rows with what `KEYS` names, options (of the attention, where rows of a task and a
    model differ in them), seeds, accuracy and majority in %, spread (the standard
    deviation over seeds; None of one), lowest, highest, published (%, or None),
    comparable (whether that is of the same setting) and selected_on_test, in the order
    of tasks, models and steps.

  Raises:
    ValueError: two runs of one seed.
  """
  groups: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
  for record in records:
    own = groups[_key(record)]
    if record["seed"] in own:
      raise ValueError(
        f"{own[record['seed']]['run']} and {record['run']} are the same run: config, "
        "data and seed are equal"
      )
    own[record["seed"]] = record
  place = lambda key: (key[0], _place(key[1]), *key[1:])
  rows = []
  for key in sorted(groups, key=place):
    runs = [groups[key][seed] for seed in sorted(groups[key])]
    scores = [100 * run["accuracy"] for run in runs]
    figure, comparable = published.accuracy(runs[0])
    rows.append(
      dict(zip(KEYS, key, strict=True))
      | {
        "options": runs[0]["options"],
        "seeds": len(runs),
        "accuracy": statistics.fmean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "lowest": min(scores),
        "highest": max(scores),
        "majority": 100 * runs[0]["majority"],
        "published": figure,
        "comparable": comparable,
        "selected_on_test": runs[0]["selected_on_test"],
      }
    )
  return [row | {"options": _told_apart(row, rows)} for row in rows]


def _told_apart(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
  """Options in which a row differs from others of its task and model."""
  same = ("task", "model", "cached")
  others = [r["options"] for r in rows if all(r[key] == row[key] for key in same)]
  own = row["options"]
  differing = [
    key
    for key in sorted({key for options in others for key in options})
    if any(options.get(key) != own.get(key) for options in others)
  ]
  return ", ".join(f"{key} {own.get(key, 'as it is')}" for key in differing)


def _place(model: str) -> int:
  """Where a model stands in tables; what follows a dash tells variants apart."""
  names = list(ATTENTIONS)
  name = model.partition("-")[0]
  return names.index(name) if name in names else len(names)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
  """Rows of equal keys as CSV, with a header."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


_HEAD = (
  "model", "parameters", "length", "steps x batch", "seeds", "accuracy %", "published %"
)  # fmt: skip
_NOTES = (
  "\nPublished figures in brackets are of other steps, batches or lengths. *: chosen "
  "by a validation split that is the test split.\n"
)


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
  """A table for each task: accuracy over seeds, beside the published number."""
  parts = []
  for task in dict.fromkeys(row["task"] for row in rows):
    own = [row for row in rows if row["task"] == task]
    parts.append(
      f"### {task}\n\nAlways the most frequent class: {own[0]['majority']:.2f} %.\n\n"
      f"| {' | '.join(_HEAD)} |\n{'|---' * len(_HEAD)}|\n" + "".join(map(_line, own))
    )
  return "\n".join(parts) + _NOTES


def _line(row: dict[str, Any]) -> str:
  spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
  options = f" ({row['options']})" if row["options"] else ""
  cells = (
    label(row) + options,
    f"{row['parameters']:,}",
    f"{row['length']:,}",
    f"{row['steps']:,} x {row['batch']}",
    str(row["seeds"]),
    f"{row['accuracy']:.2f}{spread}{'*' * row['selected_on_test']}",
    _published(row),
  )
  return f"| {' | '.join(cells)} |\n"


def _published(row: dict[str, Any]) -> str:
  if row["published"] is None:
    return "-"
  text = f"{row['published']:.2f}"
  return text if row["comparable"] else f"({text})"


def matrix(rows: Sequence[dict[str, Any]]) -> str:
  """Table 1 of Tay et al.: models by tasks, with the mean where all five are there.

  A cell has the longest run of the task, and in brackets the published figure.
  """
  cells: dict[str, dict[str, dict[str, Any]]] = {}
  for row in rows:
    task = published.task_of(row["task"])
    if task is not None:
      own = cells.setdefault(label(row), {})
      if task not in own or own[task]["steps"] < row["steps"]:
        own[task] = row
  lines = [f"| model | {' | '.join(published.TASKS)} | mean |"]
  lines.append("|---" * (len(published.TASKS) + 2) + "|")
  for name, own in cells.items():
    line = [
      "-"
      if task not in own
      else f"{own[task]['accuracy']:.2f} ({_published(own[task]).strip('()')})"
      for task in published.TASKS
    ]
    whole = len(own) == len(published.TASKS)
    scores = [row["accuracy"] for row in own.values()]
    line.append(f"{statistics.fmean(scores):.2f}" if whole else "-")
    lines.append(f"| {name} | {' | '.join(line)} |")
  return "\n".join(lines) + "\n" if cells else ""


def label(row: dict[str, Any]) -> str:
  """A model by name, and whether it has a cache."""
  return row["model"] + (" + cache" if row["cached"] else "")


def relative(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Measured speed and memory beside those of the Transformer at the same length.

  Args:
    records: lines of benchmarks.lra: model, cached, length, steps_per_second,
      batch, peak_bytes. Of equal model, length and batch the last counts.

  Returns:
    Rows with model, cached, length, batch, steps_per_second, peak_bytes, speedup and
    memory (shares of the Transformer's of equal batch; None without it), and the
    published ones of both.
  """
  newest = {(r["model"], r["cached"], r["length"], r["batch"]): r for r in records}
  rows = []
  for key in sorted(newest, key=lambda key: (_place(key[0]), *key)):
    model, cached, length, batch = key
    own, base = newest[key], newest.get(("transformer", False, length, batch))
    ratio = lambda name, own=own, base=base: base and own[name] / base[name]
    rows.append(
      {
        "model": model,
        "cached": cached,
        "length": length,
        "batch": batch,
        "steps_per_second": own["steps_per_second"],
        "peak_bytes": own["peak_bytes"],
        "speedup": ratio("steps_per_second"),
        "memory": ratio("peak_bytes"),
        "published_speedup": _share(published.STEPS_PER_SECOND, model, cached, length),
        "published_memory": _share(published.GIGABYTES, model, cached, length),
      }
    )
  return rows


def _share(
  table: dict[str, dict[int, float]], model: str, cached: bool, length: int
) -> float | None:
  found = None if cached else table.get(model, {}).get(length)
  return found and found / table["transformer"][length]


def efficiency_markdown(rows: Sequence[dict[str, Any]]) -> str:
  """Speed and memory relative to the Transformer, and in brackets as published."""
  lengths = sorted({row["length"] for row in rows})
  head = "".join(f" speed at {n:,} |" for n in lengths)
  head += "".join(f" memory at {n:,} |" for n in lengths)
  lines = [f"| model |{head}", "|---|" + "---|" * (2 * len(lengths))]
  several = len({row["batch"] for row in rows}) > 1
  said = lambda row: label(row) + (f", batch {row['batch']}" if several else "")
  for name in dict.fromkeys(map(said, rows)):
    own = {row["length"]: row for row in rows if said(row) == name}
    cells = [
      _pair(own.get(n, {}), kind) for kind in ("speedup", "memory") for n in lengths
    ]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _pair(row: dict[str, Any], kind: str) -> str:
  if row.get(kind) is None:
    return "-"
  other = row[f"published_{kind}"]
  return f"{row[kind]:.2f}" + ("" if other is None else f" ({other:.2f})")


def write(
  folder: str | os.PathLike,
  runs: Sequence[dict[str, Any]],
  measured: Sequence[dict[str, Any]],
) -> list[Path]:
  """Writes what there is to see of runs and of measurements of speed.

  Args:
    folder: is made.
    runs: as of `results`, or none.
    measured: as of `relative`'s argument, or none.

  Returns:
    The files: accuracy.md, .csv and .png; efficiency.md, .csv and .png, where lengths
    were measured; tradeoff.png, where both are there.
  """
  from cached_tx.lra import plots

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files: dict[str, str] = {}
  drawn: list[Path] = []
  rows = summary(runs) if runs else []
  speeds = relative(measured) if measured else []
  if rows:
    files |= {"accuracy.md": _accuracies(rows), "accuracy.csv": as_csv(rows)}
    drawn.append(plots.accuracy(folder / "accuracy.png", rows))
  if speeds:
    files |= {
      "efficiency.md": efficiency_markdown(speeds),
      "efficiency.csv": as_csv(speeds),
    }
    drawn.append(plots.efficiency(folder / "efficiency.png", speeds))
  if rows and speeds:
    drawn += plots.tradeoff(folder / "tradeoff.png", rows, speeds)
  for name, text in files.items():
    write_atomically(folder / name, text)
  return [*(folder / name for name in files), *drawn]


def _accuracies(rows: Sequence[dict[str, Any]]) -> str:
  return "\n".join(part for part in (matrix(rows), as_markdown(rows)) if part)


def text(runs: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> str:
  """The tables, for the terminal."""
  parts = [f"{counted(len(runs), 'finished run')}"]
  if runs:
    parts.append(_accuracies(summary(runs)))
  if measured:
    parts.append(efficiency_markdown(relative(measured)))
  return "\n\n".join(parts)
