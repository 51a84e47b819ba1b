"""The table of the README: every kind of memory, equal in all else.

python -m benchmarks.memories                 all of it, then prints the table
python -m benchmarks.memories --only train    trains what is missing
python -m benchmarks.memories --only speed    times training steps, interleaved
python -m benchmarks.memories --only table    prints what was measured

Training runs are resumed and kept in runs/memories; results are lines of
benchmarks/results/memories.jsonl, one per kind and seed, and speed.jsonl. Each carries
the program that it was measured with (see benchmarks/machine.py); what another program
gave is measured anew, and never enters one table with this one's.
"""

import argparse
import importlib.util
import statistics
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import ROOT, describe, program
from benchmarks.records import RESULTS, alike, append, measured_by
from benchmarks.timing import Runner, matmul_rate
from cached_tx.evaluate import measured
from cached_tx.inspect.flops import training_flops
from cached_tx.inspect.sizes import state_bytes
from cached_tx.train.experiment import Experiment
from cached_tx.train.loop import train

RUNS = ROOT / "runs" / "memories"
CONFIG = ROOT / "configs" / "compare.py"


def compare() -> Any:
  """The module configs/compare.py."""
  spec = importlib.util.spec_from_file_location("compare", CONFIG)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config_of(kind: str, seed: int) -> Any:
  """The config of one run."""
  config = compare().get_config(kind)
  with config.unlocked():
    config.seed = seed
  return config


def begun_here(workdir: Path) -> None:
  """Notes the program that begins a run; refuses to continue one of another."""
  note, now = workdir / "program", program()
  if note.exists() and note.read_text() != now:
    raise SystemExit(
      f"{workdir} was begun by program {note.read_text()}, and this is {now}: one "
      "number would stand for both; delete the folder to begin anew"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  note.write_text(now)


def one(kind: str, seed: int) -> dict[str, Any]:
  """Trains one model and evaluates it on the test split."""
  config = config_of(kind, seed)
  experiment = Experiment(config)
  begun_here(RUNS / f"{kind}-{seed}")
  result = train(config, RUNS / f"{kind}-{seed}")
  if not result.finished:
    raise SystemExit("interrupted; run the same command again to go on")
  found = measured(
    experiment,
    result.state.params,
    steps=config.steps,
    split="test",
    memory=("kept", "zeroed"),
    rows=config.eval.batch,
  )
  bits = {name: score["bits_per_byte"] for name, score in found["scores"].items()}
  model = experiment.model
  return {
    "kind": kind,
    "seed": seed,
    **bits,
    "steps": config.steps,
    "tokens": config.steps * config.batch * config.segment * config.segments,
    "parameters": sum(a.size for a in jax.tree.leaves(result.state.params)),
    "training_flops_per_token": training_flops(model, config.segments),
    "state_bytes_per_row": state_bytes(model),
    **describe(),
  }


def speed(repeats: int, steps: int) -> None:
  """Times training steps of all kinds in turn, so that all see the same machine."""
  about = describe()  # refuses a program without a name, before minutes are spent
  runners = {kind: Runner(config_of(kind, 0)) for kind in compare().MEMORIES}
  for runner in runners.values():
    runner.seconds(1)  # compiles
  for _ in range(repeats):
    for kind, runner in runners.items():
      rate = steps * runner.tokens / runner.seconds(steps)
      beside = {"tokens_per_second": rate, "product_gflops": matmul_rate()}
      append(RESULTS / "speed.jsonl", {"kind": kind, **beside, **about})


def table() -> str:
  """Markdown: mean and spread over seeds."""
  done = measured_by("memories.jsonl", None)
  rates = alike(measured_by("speed.jsonl", None))
  rows = [
    "| memory | bits per byte | memory ablated | parameters "
    "| training MFLOP per token | tokens/s | state per row |",
    "|---|---|---|---|---|---|---|",
  ]
  for kind in compare().MEMORIES:
    own = [r for r in done if r["kind"] == kind]
    if not own:
      continue

    def spread(key: str, own: list = own) -> str:
      values = [r[key] for r in own]
      mean = f"{statistics.mean(values):.3f}"
      if len(values) == 1:
        return f"{mean} (one seed)"
      return f"{mean} ± {statistics.stdev(values):.3f}"

    fast = [r["tokens_per_second"] for r in rates if r["kind"] == kind]
    rate = f"{statistics.median(fast):,.0f}" if fast else "-"
    rows.append(
      f"| {kind} | {spread('kept')} | {spread('zeroed')} | {own[0]['parameters']:,} "
      f"| {own[0]['training_flops_per_token'] / 1e6:.2f} | {rate} "
      f"| {own[0]['state_bytes_per_row'] / 1024:.0f} KiB |"
    )
  return "\n".join(rows)


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--kinds", default="", help="comma-separated; all if empty")
  parser.add_argument("--only", choices=("train", "speed", "table"))
  parser.add_argument("--repeats", type=int, default=7, help="rounds of timing")
  args = parser.parse_args()
  if args.only in (None, "train"):
    kinds = args.kinds.split(",") if args.kinds else list(compare().MEMORIES)
    for seed in range(args.seeds):
      for kind in kinds:
        known = {
          (r["kind"], r["seed"]) for r in measured_by("memories.jsonl", program())
        }
        if (kind, seed) not in known:
          append(RESULTS / "memories.jsonl", one(kind, seed))
  if args.only == "speed" or not (args.only or measured_by("speed.jsonl", program())):
    speed(args.repeats, steps=4)
  print(table())


if __name__ == "__main__":
  main()
