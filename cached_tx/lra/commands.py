"""`cached-tx lra ...`: flags, and what is printed."""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from cached_tx.cli import (
  STOPPED,
  Command,
  config_flag,
  json_flag,
  process_flags,
  required,
  show,
  workdir_flag,
)
from cached_tx.tables import aligned, counted


def _text(values: flags.FlagValues, name: str, text: str) -> None:
  flags.DEFINE_string(name, None, text, flag_values=values)


def _define_list(values: flags.FlagValues, argv: list[str]) -> None:
  del values, argv


def _list(values: Any) -> None:
  del values
  from cached_tx.data.lra import TASKS
  from cached_tx.layers.attentions import ATTENTIONS

  rows = [("task", "length", "vocabulary", "classes", "rows")]
  rows += [
    (name, f"{t.length:,}", str(t.vocab), str(t.classes), str(t.inputs))
    for name, t in TASKS.items()
  ]
  sources = ["", *(t.source for t in TASKS.values())]
  for line, source in zip(aligned(rows), sources, strict=True):
    print(f"{line}  {source}")
  print(f"\nmodels: {', '.join(ATTENTIONS)}; each also with ,cached after its name")
  print(
    "\ncached-tx lra prepare --task listops\n"
    "cached-tx lra train --config configs/lra/listops.py:bigbird,cached --workdir DIR\n"
    "cached-tx lra evaluate --workdir DIR\n"
    "cached-tx lra table --runs RUNS"
  )


def _define_prepare(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  own: Any = {"flag_values": values}
  _text(values, "task", "which; cached-tx lra list names them")
  _text(values, "source", "file or folder of the original data, where it is not made")
  flags.DEFINE_string("out", "data/lra", "folder for prepared data", **own)
  text = "of generated data, and of splits that are carved out of others"
  flags.DEFINE_integer("seed", 0, text, 0, **own)
  flags.DEFINE_integer("processes", 0, "that generate; 0: one per core", 0, **own)


def _prepare(values: Any) -> None:
  required(values, "task")
  from cached_tx.data.lra import prepare

  found = prepare(
    values.task,
    values.out,
    source=values.source,
    seed=values.seed,
    processes=values.processes,
  )
  sizes = ", ".join(f"{split} {count:,}" for split, count in found.items())
  print(f"{values.task} is in {values.out}: {sizes}")


def _define_train(values: flags.FlagValues, argv: list[str]) -> None:
  config_flag(values, argv, more=True)  # attentions have options that a file lacks
  workdir_flag(values, "folder of the run; one that holds a run continues it")
  text = "when training has finished, evaluate on the test split"
  flags.DEFINE_bool("report", True, text, flag_values=values)
  process_flags(values)


def _train(values: Any) -> int:
  required(values, "config", "workdir")
  from cached_tx.train.processes import join

  join(values.distributed, values.heartbeat)  # before anything else uses devices
  from cached_tx.lra.training import RESULT, evaluate, train

  result = train(values.config, values.workdir)
  if not result.finished:
    done, steps = int(result.state.step), values.config.steps
    print(
      f"cached-tx: stopped by a signal after step {done} of {steps}, which is saved;"
      f" the same command continues there (exit status {STOPPED})",
      file=sys.stderr,
    )
    return STOPPED
  if not result.done:
    print(f"{values.workdir} has all {values.config.steps} steps: nothing to train")
  if values.report and (result.done or not Path(values.workdir, RESULT).exists()):
    print(_said(evaluate(values.workdir)))
  return 0


def _define_evaluate(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  own: Any = {"flag_values": values}
  workdir_flag(values)
  splits = ["test", "validation", "train"]
  flags.DEFINE_enum("split", "test", splits, "what is classified", **own)
  text = "of another checkpoint than the best by validation loss"
  flags.DEFINE_integer("step", None, text, 0, **own)
  json_flag(values)


def _evaluate(values: Any) -> None:
  required(values, "workdir")
  from cached_tx.lra.training import evaluate

  found = evaluate(values.workdir, split=values.split, step=values.step)
  show(_said(found), found, values.json)


_CHOSEN = {
  "validation": "chosen by validation loss",
  "newest": "the newest: none was scored",
  "step": "the one that was named",
}


def _said(found: dict[str, Any]) -> str:
  cached = " with a cache" if found["cached"] else ""
  text = (
    f"{found['task']}, {found['model']}{cached}, {found['parameters']:,} parameters: "
    f"{100 * found['accuracy']:.2f} % of {counted(found['examples'], 'example')} "
    f"({found['split']}) after step {found['step']:,} of {found['steps']:,}, "
    f"{_CHOSEN[found['chosen']]}; always the most frequent class: "
    f"{100 * found['majority']:.2f} %"
  )
  if found["selected_on_test"] and found["chosen"] == "validation":
    text += "; the validation split is the test split: this number was selected"
  if found["trained"] < found["steps"]:
    text += f"; not finished, {found['trained']:,} steps so far: no result was written"
  return text


def _define_table(values: flags.FlagValues, argv: list[str]) -> None:
  del argv
  own: Any = {"flag_values": values}
  text = "folder below which finished runs are, or a file with a result in each line"
  _text(values, "runs", text)
  text = "lines of measured speed: what python -m benchmarks.lra writes"
  _text(values, "efficiency", text)
  text = "folder for Markdown, CSV and plots; without it tables are printed only"
  flags.DEFINE_string("out", None, text, **own)


def _table(values: Any) -> None:
  if values.runs is None and values.efficiency is None:
    raise ValueError("--runs or --efficiency is required")
  from cached_tx.lra import table

  runs = [] if values.runs is None else table.results(values.runs)
  measured: list[dict[str, Any]] = []
  if values.efficiency is not None:
    lines = Path(values.efficiency).read_text().splitlines()
    measured = [json.loads(line) for line in lines]
  print(table.text(runs, measured))
  if values.out is not None:
    for path in table.write(values.out, runs, measured):
      print(path)


COMMANDS = {
  "list": Command("tasks and models", _define_list, _list),
  "prepare": Command("make or read the data of a task", _define_prepare, _prepare),
  "train": Command("train, or continue, a classifier", _define_train, _train),
  "evaluate": Command(
    "the accuracy of a run on all of a split", _define_evaluate, _evaluate
  ),
  "table": Command(
    "finished runs beside published numbers: tables and plots", _define_table, _table
  ),
}
