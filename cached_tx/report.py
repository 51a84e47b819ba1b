"""What a finished run shows: scores beside baselines, a sample, a plot, the speed."""

import io
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cached_tx import baselines
from cached_tx.evaluate import measured, opened
from cached_tx.files import write_atomically
from cached_tx.generate import write
from cached_tx.load import Loaded
from cached_tx.tables import aligned, counted
from cached_tx.train.config import to_json
from cached_tx.train.experiment import Experiment
from cached_tx.train.metrics import read_log
from cached_tx.train.plots import gauge_plot, loss_plot
from cached_tx.train.processes import wait_for_others
from cached_tx.train.speed import Measured

LARGEST = 20_000_000  # bytes of training text, up to which baselines are computed
SAMPLE = 300  # tokens


def report(workdir: str | os.PathLike) -> dict[str, Any]:
  """Evaluates the newest checkpoint, and prints and writes what there is to see.

  Every process of a run calls it; process 0 prints, and writes report.json,
  report.md and loss.png.

  Returns:
    JSON data: step, parameters, test (see `cached_tx.evaluate.measured`), baselines
    (bits per byte by name, or None with "baselines_skipped" saying why), sample (text,
    or None with "sample_skipped"), speed, files.
  """
  experiment, params, rows, about = opened(workdir)
  step = about["step"]
  found: dict[str, Any] = {
    "step": step,
    "parameters": sum(a.size for a in jax.tree.leaves(params)),
    "test": measured(
      experiment,
      params,
      steps=step,
      split="test",
      memory=("kept", "zeroed"),
      rows=rows,
    ),
  }
  first = jax.process_index() == 0
  if first:  # written before the sample, which a large model may not have room for
    found["baselines"], found["baselines_skipped"] = _baselines(experiment)
    found["speed"] = speed(experiment.config, workdir)
    found["sample"], found["sample_skipped"] = None, "the report was cut off"
    _files(experiment, Path(workdir), found)
  params = _gathered(params)  # collective: no process may have left
  if first:
    found["sample"], found["sample_skipped"] = _sample(experiment, params, step)
    found["files"] = _files(experiment, Path(workdir), found)
    print(text(found))
  if jax.process_count() > 1:
    wait_for_others("the report is written")
  return found


def _sample(
  experiment: Experiment, params: Any, step: int
) -> tuple[str | None, str | None]:
  """Text, or None and why not."""
  sample = io.BytesIO()
  try:
    own = _on_one_device(experiment, params, step)
    write(own, b"", sample, tokens=SAMPLE, temperature=0.8, seed=0)
  except (RuntimeError, MemoryError) as error:  # the model needs more than one device
    return None, f"one device could not write it: {error}".splitlines()[0]
  return sample.getvalue().decode(errors="replace"), None


def _gathered(params: Any) -> Any:
  """The whole parameters on every host; every process must call it."""
  if jax.process_count() == 1:
    return jax.device_get(params)
  return multihost_utils.process_allgather(params, tiled=True)


def _on_one_device(experiment: Experiment, params: Any, step: int) -> Loaded:
  """What `load` would give, without a read that other processes must share."""
  model = experiment.model.after(step)
  params = jax.device_put(params, jax.local_devices()[0])
  state = model.open_stream(model.initial_state(1), 1)
  return Loaded(model, params, state, experiment.tokenizer, experiment.config, step)


def _baselines(experiment: Experiment) -> tuple[dict[str, float] | None, str | None]:
  """Bits per byte of the test split by name, or None and why not."""
  parts, size = [], 0
  for document in experiment.documents("train"):
    parts.append(document)
    size += len(document)
    if size > LARGEST:
      return None, f"the training text has more than {LARGEST / 1e6:.0f} MB"
  train, test = b"".join(parts), b"".join(experiment.documents("test"))
  found = baselines.compressors(train, test)
  for order, bits in baselines.ngrams(train, test).items():
    found[f"{order}-byte context, counted"] = bits
  return found, None


def speed(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float | None]:
  """Start-up and throughput of a run, from its metrics.jsonl.

  Seconds are of the latest start. Speed is that of all logged steps together, without
  the first of each start, evaluations and saving (`cached_tx.train.speed`); None if no
  other step was logged.
  """
  records = list(read_log(Path(workdir) / "metrics.jsonl"))
  events = {r["event"]: r for r in records if r["kind"] == "event"}  # the latest
  lines = [r for r in records if r["kind"] == "train" and "seconds" in r]
  tokens = sum(r["seconds"] * r["tokens_per_second"] for r in lines)
  rate = Measured(tokens, sum(r["seconds"] for r in lines)).rate
  per_step = config.batch * config.segment * config.segments
  end = events.get("end", {})
  return {
    "first_step_seconds": events.get("first_step", {}).get("seconds"),
    "compile_seconds": end.get("compile_seconds"),
    "recompilations": end.get("recompilations"),
    "tokens_per_second": rate,
    "steps_per_second": rate / per_step if rate else None,
  }


def _files(
  experiment: Experiment, workdir: Path, found: dict[str, Any]
) -> dict[str, str]:
  """Writes everything; returns where it lies."""
  references = found["baselines"] or {}
  shown = {name: references[name] for name in ("gzip -9", "bz2 -9") if references}
  score = found["test"]["scores"]["kept"]["bits_per_byte"]
  plot = loss_plot(
    workdir / "metrics.jsonl",
    workdir / "loss.png",
    references=shown,
    title=f"{found['test']['data']}, {found['parameters']:,} parameters: "
    f"{score:.3f} bits per byte on the test text",
  )
  names = {
    "report": workdir / "report.md",
    "data": workdir / "report.json",
    "plot": plot,
    **_gauge_plots(workdir),
    "metrics": workdir / "metrics.jsonl",
    "TensorBoard": workdir / "tensorboard",
    "checkpoints": workdir / "checkpoints",
  }
  files = {name: os.fspath(path) for name, path in names.items()}
  data = {**found, "config": to_json(experiment.config), "files": files}
  write_atomically(names["data"], json.dumps(data, indent=2) + "\n")
  write_atomically(names["report"], markdown({**found, "files": files}))
  return files


def _gauge_plots(workdir: Path) -> dict[str, Path]:
  """Draws the newest gauges of every name, if the run has logged any."""
  lines = [r for r in read_log(workdir / "metrics.jsonl") if r["kind"] == "gauge"]
  newest = lines[-1] if lines else {}
  return {
    f"plot of {name}": gauge_plot(
      newest, workdir / f"{name}.png", name=name, title=f"step {newest['step'] + 1}"
    )
    for name in sorted({key.split("/")[0] for key in newest if "/" in key})
  }


def ranking(found: dict[str, Any]) -> list[tuple[str, float]]:
  """Names and bits per byte, the best first."""
  scores = found["test"]["scores"]
  rows = {
    "this model": scores["kept"]["bits_per_byte"],
    "this model, memory emptied": scores["zeroed"]["bits_per_byte"],
    **(found["baselines"] or {}),
  }
  return sorted(rows.items(), key=lambda row: row[1])


def _facts(found: dict[str, Any]) -> list[str]:
  """What was evaluated, and how fast it was trained."""
  test, fast = found["test"], found["speed"]

  def number(name: str, form: str) -> str:
    return "unknown" if fast[name] is None else format(fast[name], form)

  again = fast["recompilations"]
  recompiled = "recompilations unknown"
  if again is not None:
    recompiled = counted(again, "recompilation")
  rate = "speed not measured: no step after the first was logged"
  if fast["tokens_per_second"] is not None:
    rate = (
      f"{number('steps_per_second', '.2f')} steps/s, "
      f"{number('tokens_per_second', ',.0f')} tokens/s"
    )
  return [
    f"{counted(found['parameters'], 'parameter')} after "
    f"{counted(found['step'], 'step')}, on {test['data']} {test['split']}: "
    f"{counted(test['bytes'], 'byte')} in {counted(test['documents'], 'document')}",
    f"first step after {number('first_step_seconds', '.1f')} s, "
    f"{number('compile_seconds', '.1f')} s of compiling in all, "
    f"{recompiled}, {rate}",
  ]


def text(found: dict[str, Any]) -> str:
  """The report for a terminal."""
  rows = [("bits per byte of the test text", "")]
  best = max(bits for _, bits in ranking(found))
  for name, bits in ranking(found):
    bar = "#" * max(1, round(30 * bits / best))
    rows.append((f"  {name}", f"{bits:.3f}  {bar:30}"))
  rows = [(name, value.rstrip().ljust(37) if value else "") for name, value in rows]
  lines = ["", *_facts(found), "", *aligned(rows)]
  if found["baselines"] is None:
    lines.append(f"  no compressors, no n-grams: {found['baselines_skipped']}")
  if found["sample"] is None:
    lines += ["", f"no sample: {found['sample_skipped']}"]
  else:
    lines += ["", "a sample, from nothing, at temperature 0.8", ""]
    lines += [f"  {line}" for line in printable(found["sample"]).splitlines()]
  lines += ["", *aligned([(name, path) for name, path in found["files"].items()], 2)]
  return "\n".join(lines)


def markdown(found: dict[str, Any]) -> str:
  """The report as a file."""
  lines = ["# Report", "", *_facts(found), "", "| | bits per byte |", "|---|---|"]
  lines += [f"| {name} | {bits:.3f} |" for name, bits in ranking(found)]
  if found["baselines"] is None:
    lines += ["", f"No compressors, no n-grams: {found['baselines_skipped']}."]
  lines += ["", "![Loss](loss.png)", ""]
  if found["sample"] is None:
    lines += [f"No sample: {found['sample_skipped']}."]
  else:
    lines += ["A sample, from nothing, at temperature 0.8:", ""]
    lines += [f"    {line}" for line in printable(found["sample"]).splitlines()]
  return "\n".join(lines) + "\n"


def printable(sample: str) -> str:
  """Without control characters that would upset a terminal."""
  return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in sample)
