"""How far back each kind of memory can be asked: the long run of `cached-tx recall`.

python -m benchmarks.recall                trains what is missing, draws the plot
python -m benchmarks.recall --only plot    draws what was measured

Results are lines of benchmarks/results/recall.jsonl, one per task, kind and seed, each
with the program that it was measured with (see benchmarks/machine.py): what another
program gave, or other flags, is measured anew and never drawn beside this one's.
"""

import argparse
from typing import Any

from benchmarks.machine import describe, program
from benchmarks.records import RESULTS, append, measured_by
from cached_tx.data.recall import CHANCE, TASKS
from cached_tx.recall import MEMORIES, SEGMENT, SLOTS, one, text
from cached_tx.train.plots import recall_plot

FILE = "recall.jsonl"


def runs(which: str | None, steps: int, longest: int) -> list[dict[str, Any]]:
  """What one program has measured with these flags; None: the last one's."""
  if not (RESULTS / FILE).exists():
    return []
  found = measured_by(FILE, which)
  return [r for r in found if (r["steps"], r["longest"]) == (steps, longest)]


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--max_distance", type=int, default=6)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--tasks", default=",".join(TASKS))
  parser.add_argument("--kinds", default=",".join(MEMORIES))
  parser.add_argument("--only", choices=("plot",))
  args = parser.parse_args()
  longest = args.max_distance
  for seed in range(0 if args.only else args.seeds):
    for task in args.tasks.split(","):
      for kind in args.kinds.split(","):
        done = runs(program(), args.steps, longest)
        if (task, kind, seed) in {(r["task"], r["kind"], r["seed"]) for r in done}:
          continue
        run = one(kind, task, steps=args.steps, seed=seed, longest=longest)
        append(RESULTS / FILE, {**run, "longest": longest, **describe()})
        shares = " ".join(f"{100 * share:.0f}" for share in run["accuracy"])
        print(f"{task}, {kind}, seed {seed}: {shares}, {run['seconds']:.0f} s")
  found = {
    "segment": SEGMENT,
    "slots": SLOTS,
    "longest": longest,
    "chance": CHANCE,
    "runs": runs(None, args.steps, longest),
  }
  if not found["runs"]:
    raise SystemExit("nothing was measured with these flags")
  found["plot"] = str(recall_plot(found, RESULTS / "recall.png"))
  print(text(found))


if __name__ == "__main__":
  main()
