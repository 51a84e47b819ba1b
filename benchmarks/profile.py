"""Where the time of a training step goes, by part of the model.

python -m benchmarks.profile            case A of benchmarks.xl_speed
python -m benchmarks.profile --case B

Operations that run at once, on several cores, each count in full. What no rule names is
"rest"; zeros are what XLA fills before a loop stacks its results in them. Writes
benchmarks/results/xl_profile.json.
"""

import argparse
import collections
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.machine import describe
from benchmarks.records import RESULTS
from benchmarks.timing import Runner
from benchmarks.xl_speed import CASES, config_of

# The first rule that matches the name that JAX gave an operation tells its part.
PARTS = (
  ("feed-forward", r"/mlp/"),
  ("vocabulary", r"Vocabulary"),
  ("dropout", r"/drop/|Dropout"),
  ("positions by distance", r"_by_distance|distance_scores"),
  ("projections", r"/(query|key|value|output)/.*dot_general"),
  ("attention: products", r"attention\.read/(bqhk,bshk->bhqs|bhqs,bshk->bqhk)"),
  ("attention: softmax and the rest", r"/attention"),
)


def part_of(operation: str, line: str) -> str:
  """The part of the model that an operation of the compiled step belongs to."""
  if operation.startswith("wrapped_broadcast"):
    return "zeros"
  found = re.search(r'op_name="([^"]*)"', line)
  name = found.group(1) if found else ""
  return next((part for part, rule in PARTS if re.search(rule, name)), "rest")


def profile(case: str, steps: int) -> dict[str, Any]:
  """Milliseconds of a step by part."""
  runner = Runner(config_of(CASES[case]))
  runner.seconds(2)  # compiles
  lines = {}
  for line in runner.compiled_text().splitlines():
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if found:
      lines[found.group(1)] = line
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      seconds = runner.seconds(steps)
    (path,) = Path(folder).rglob("*.xplane.pb")
    data = ProfileData.from_file(str(path))
  parts: collections.Counter[str] = collections.Counter()
  for plane in data.planes:
    for own in plane.lines:
      for event in own.events:
        if event.name in lines and not re.match(r"while|call|conditional", event.name):
          parts[part_of(event.name, lines[event.name])] += event.duration_ns
  share = {part: round(t / 1e6 / steps, 1) for part, t in parts.most_common()}
  return {
    "case": case,
    "milliseconds_per_step": round(1e3 * seconds / steps, 1),
    "operations": share,
  }


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--case", default="A", choices=CASES)
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--dry", action="store_true", help="write nothing")
  args = parser.parse_args()
  about = {} if args.dry else describe()
  found = profile(args.case, args.steps) | about
  if not args.dry:
    path = RESULTS / "xl_profile.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {args.case: found}, indent=2) + "\n")
  print(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
