"""Pictures of tables: accuracy; speed and memory against length; one by the other."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cached_tx.train.plots import grid, new_figure, written

Row = dict[str, Any]
_GREY = "#6b6b6b"


def _name(row: Row) -> str:
  return row["model"] + (" + cache" if row["cached"] else "")


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
  from matplotlib import colormaps  # 0.5 s

  models = list(dict.fromkeys(row["model"] for row in rows))
  return {model: colormaps["tab20"](i % 20) for i, model in enumerate(models)}


def accuracy(png_path: str | os.PathLike, rows: Sequence[Row]) -> Path:
  """A panel for each task: mean and range over seeds, published numbers as crosses.

  A cross is grey where the published setting is another.

  Args:
    png_path: written anew.
    rows: as of `cached_tx.lra.table.summary`.
  """
  tasks = list(dict.fromkeys(row["task"] for row in rows))
  colours = _colours(rows)
  most = max(sum(row["task"] == task for row in rows) for task in tasks)
  figure = new_figure(max(5.0, 2.0 + 0.55 * most), 3.2 * len(tasks))
  panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
  for axes, task in zip(panels, tasks, strict=True):
    own = [row for row in rows if row["task"] == task]
    for i, row in enumerate(own):
      low, high = row["accuracy"] - row["lowest"], row["highest"] - row["accuracy"]
      hatch = "//" if row["cached"] else None
      colour = colours[row["model"]]
      axes.bar(i, row["accuracy"], yerr=[[low], [high]], color=colour, hatch=hatch)
      if row["published"] is not None:
        colour = "black" if row["comparable"] else _GREY
        axes.plot(i, row["published"], "x", color=colour, markersize=6)
    axes.axhline(own[0]["majority"], color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    names = [f"{_name(row)}\n{row['steps']:,} steps" for row in own]
    axes.set_xticks(range(len(own)), names, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("accuracy, %", fontsize=10)
    axes.set_title(task, fontsize=12, loc="left")
    grid(axes)
  return written(figure, png_path)


def efficiency(png_path: str | os.PathLike, rows: Sequence[Row]) -> Path:
  """Steps per second and peak memory against length, on logarithmic axes.

  Args:
    png_path: written anew.
    rows: as of `cached_tx.lra.table.relative`.
  """
  colours = _colours(rows)
  figure = new_figure(11.0, 4.5)
  panels = figure.subplots(1, 2)
  kinds = (("steps_per_second", "steps per second"), ("peak_bytes", "peak memory, MiB"))
  for axes, (kind, title) in zip(panels, kinds, strict=True):
    for name in dict.fromkeys(map(_name, rows)):
      own = sorted((r for r in rows if _name(r) == name), key=lambda r: r["length"])
      scale = 2**20 if kind == "peak_bytes" else 1
      axes.plot(
        [row["length"] for row in own],
        [row[kind] / scale for row in own],
        "o--" if own[0]["cached"] else "o-",
        color=colours[own[0]["model"]],
        markersize=3,
        label=name,
      )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens", fontsize=10)
    axes.set_title(title, fontsize=12, loc="left")
    grid(axes)
  panels[0].legend(frameon=False, fontsize=7, ncols=2)
  return written(figure, png_path)


def tradeoff(
  png_path: str | os.PathLike, rows: Sequence[Row], speeds: Sequence[Row]
) -> list[Path]:
  """Accuracy against speed, a circle's area being memory: figure 3 of Tay et al.

  Speed and memory are those of the greatest length that was measured, accuracy the
  mean over the tasks that all models of the picture have.

  Args:
    png_path: written anew.
    rows: as of `cached_tx.lra.table.summary`; of equal task and model the longest run.
    speeds: as of `cached_tx.lra.table.relative`.

  Returns:
    The file; nothing where no model has both.
  """
  longest = max(row["length"] for row in speeds)
  fast = {_name(row): row for row in speeds if row["length"] == longest}
  scores: dict[str, dict[str, tuple[int, float]]] = {}
  for row in rows:
    own = scores.setdefault(_name(row), {})
    steps, _ = own.get(row["task"], (-1, 0.0))
    if row["steps"] > steps:
      own[row["task"]] = row["steps"], row["accuracy"]
  names = [name for name in scores if name in fast]
  if not names:
    return []
  shared = [
    task for task in scores[names[0]] if all(task in scores[name] for name in names)
  ]
  if not shared:
    return []
  colours = _colours(rows)
  figure = new_figure(7.0, 5.0)
  axes = figure.add_subplot()
  largest = max(fast[name]["peak_bytes"] for name in names)
  for name in names:
    row = fast[name]
    height = sum(scores[name][task][1] for task in shared) / len(shared)
    area = 1500 * row["peak_bytes"] / largest
    colour = colours.get(row["model"], _GREY)
    axes.scatter(row["steps_per_second"], height, s=area, color=colour, alpha=0.6)
    axes.annotate(name, (row["steps_per_second"], height), fontsize=8, ha="center")
  axes.set_xscale("log")
  axes.set_xlabel(f"steps per second at {longest:,} tokens", fontsize=10)
  axes.set_ylabel(f"accuracy, %, mean of {', '.join(shared)}", fontsize=10)
  axes.margins(0.2)
  grid(axes)
  return [written(figure, png_path)]
