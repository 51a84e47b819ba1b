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

# Task, model, cached, length, steps, batch, parameters.
Key = tuple[str, str, bool, int, int, int, int]


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
  sizes = (record[name] for name in ("length", "steps", "batch", "parameters"))
  length, steps, batch, parameters = sizes
  own = record["task"], record["model"], record["cached"]
  return *own, length, steps, batch, parameters


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row for all seeds of a task, a model, its size, length, steps and batch.

  Returns:
    Rows with task, model, cached, length, steps, batch, seeds, accuracy and majority in
    %, spread (the standard deviation over seeds; None of one), published (%, or None),
    lowest, highest and parameters, in the order of tasks, models and steps.

  Raises:
    ValueError: two runs of one seed.
  """
  groups: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
  for record in records:
    own = groups[_key(record)]
    if record["seed"] in own:
      raise ValueError(
        f"{own[record['seed']]['run']} and {record['run']} are the same run: task, "
        "model, its size, length, steps, batch and seed are equal"
      )
    own[record["seed"]] = record
  place = lambda key: (key[0], _place(key[1]), *key[1:])
  rows = []
  for key in sorted(groups, key=place):
    runs = [groups[key][seed] for seed in sorted(groups[key])]
    scores = [100 * run["accuracy"] for run in runs]
    task, model, cached, length, steps, batch, parameters = key
    rows.append(
      {
        "task": task,
        "model": model,
        "cached": cached,
        "length": length,
        "steps": steps,
        "batch": batch,
        "seeds": len(runs),
        "accuracy": statistics.fmean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "lowest": min(scores),
        "highest": max(scores),
        "majority": 100 * runs[0]["majority"],
        "published": published.accuracy(task, model, cached),
        "parameters": parameters,
      }
    )
  return rows


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


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
  """A table for each task: accuracy over seeds, beside the published number."""
  parts = []
  for task in dict.fromkeys(row["task"] for row in rows):
    own = [row for row in rows if row["task"] == task]
    parts.append(
      f"### {task}\n\nAlways the most frequent class: {own[0]['majority']:.2f} %.\n\n"
      "| model | parameters | steps x batch | seeds | accuracy % | published % |\n"
      "|---|---|---|---|---|---|\n" + "".join(map(_line, own))
    )
  return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
  spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
  other = "-" if row["published"] is None else f"{row['published']:.2f}"
  return (
    f"| {label(row)} | {row['parameters']:,} | {row['steps']:,} x {row['batch']} | "
    f"{row['seeds']} | "
    f"{row['accuracy']:.2f}{spread} | {other} |\n"
  )


def label(row: dict[str, Any]) -> str:
  """A model by name, and whether it has a cache."""
  return row["model"] + (" + cache" if row["cached"] else "")


def relative(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Measured speed and memory beside those of the Transformer at the same length.

  Args:
    records: lines of benchmarks.lra: model, cached, length, steps_per_second,
      peak_bytes. Of equal model and length the last counts.

  Returns:
    Rows with model, cached, length, steps_per_second, peak_bytes, speedup and memory
    (shares of the Transformer's; None without it), and the published ones of both.
  """
  newest = {(r["model"], r["cached"], r["length"]): r for r in records}
  rows = []
  for model, cached, length in sorted(newest, key=lambda key: (_place(key[0]), *key)):
    own = newest[model, cached, length]
    base = newest.get(("transformer", False, length))
    ratio = lambda name, own=own, base=base: base and own[name] / base[name]
    rows.append(
      {
        "model": model,
        "cached": cached,
        "length": length,
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
  for name in dict.fromkeys(label(row) for row in rows):
    own = {row["length"]: row for row in rows if label(row) == name}
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
    files |= {"accuracy.md": as_markdown(rows), "accuracy.csv": as_csv(rows)}
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


def text(runs: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> str:
  """The tables, for the terminal."""
  parts = [f"{counted(len(runs), 'finished run')}"]
  if runs:
    parts.append(as_markdown(summary(runs)))
  if measured:
    parts.append(efficiency_markdown(relative(measured)))
  return "\n\n".join(parts)
