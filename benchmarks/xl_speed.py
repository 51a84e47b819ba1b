r"""How fast a training step of Transformer-XL is, and what other memories add to it.

python -m benchmarks.xl_speed                  all cases, in turn, prints a table
python -m benchmarks.xl_speed --cases A,B      some of them

On a CPU with glibc two settings that are none of the program's make a step faster: a
device for each core, and large pages, for fresh memory of a step costs a fault a page:

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_NUM_CPU_DEVICES=2 \
    python -m benchmarks.xl_speed

A step is forward, backward, clipping and Adam in float32, dropout 0.1. A case's time is
compared with a product of 2048 x 2048 matrices in the same round, since machines that
are shared change their speed. The authors' PyTorch code is not run here: it was
measured once, see benchmarks/results/xl_official.json, and in turns with this one in
benchmarks/results/xl_beside_torch.jsonl. The column "scaled" supposes
that it would slow down as the product does; 1 is its speed. Records are lines of
benchmarks/results/xl_speed.jsonl.
"""

import argparse
import json
import statistics
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks.machine import describe
from benchmarks.memories import compare
from benchmarks.records import RESULTS, append
from benchmarks.timing import Runner, matmul_rate
from cached_tx.inspect.flops import training_flops


class Case(NamedTuple):
  """A model, and what its speed is compared with."""

  sizes: dict[str, int]
  memory: dict[str, Any]
  changes: dict[str, Any] = {}  # noqa: RUF012 - never written to
  beside: str = ""  # the case that this one is a multiple of
  segments: int = 1  # of a step, of so many fewer rows: as many tokens


OFFICIAL = json.loads((RESULTS / "xl_official.json").read_text())
SMALL = dict(layers=4, width=256, heads=4, mlp=1024, segment=128, batch=16)
LARGE = dict(layers=6, width=512, heads=8, mlp=2048, segment=256, batch=4)
XL = dict(kind="xl", size=128)
COMPRESSIVE = dict(
  kind="compressive",
  size=64,
  compressed=64,
  rate=4,
  compressor="conv",
  loss="attention",
)
GRC = dict(kind="grc", size=128, ratio=0.5)
CASES = {
  "A": Case(SMALL, XL),
  "A without dropout": Case(SMALL, XL, dict(dropout=0.0), beside="A"),
  "A without positions": Case(SMALL, XL, dict(positions="none"), beside="A"),
  "A rotary": Case(SMALL, XL, dict(positions="rotary"), beside="A"),
  "A compressive": Case(SMALL, COMPRESSIVE, beside="A"),
  "A none": Case(SMALL, dict(kind="none"), beside="A"),
  "A none by two": Case(SMALL, dict(kind="none"), segments=2),
  "A grc by two": Case(SMALL, GRC, beside="A none by two", segments=2),  # for its gates
  "B": Case(LARGE, dict(kind="xl", size=256)),
}


def config_of(case: Case) -> ConfigDict:
  """The whole config of a case."""
  config = compare().get_config("xl")
  sizes = dict(case.sizes)
  with config.unlocked():
    config.memory = ConfigDict(case.memory)
    config.segment, config.batch = sizes.pop("segment"), sizes.pop("batch")
    config.segments = config.tbptt = case.segments
    config.batch //= case.segments
    config.model.update(sizes)
    config.model.update(dict(positions="relative", activation="relu", dropout=0.1))
    config.model.unroll = case.sizes["layers"]  # no copies of what is stacked
    config.model.update(case.changes)
    config.optimizer.update(dict(muon=0.0, peak=2.5e-4, warmup=0, decay=0.0, clip=0.25))
  return config.lock()


def measure(names: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
  """One record for each case and round; the cases take turns."""
  runners = {name: Runner(config_of(CASES[name])) for name in names}
  flops = {}
  for name, runner in runners.items():
    runner.seconds(1)  # compiles
    own = runner.experiment
    flops[name] = training_flops(own.model, own.config.segments)
  found = []
  for number in range(rounds):
    for name, runner in runners.items():
      before = matmul_rate()
      rate = steps * runner.tokens / runner.seconds(steps)
      found.append({
        "case": name,
        "round": number,
        "tokens_per_second": round(rate, 1),
        "product_gflops": round((before + matmul_rate()) / 2, 1),
        "step_gflops": round(rate * flops[name] / 1e9, 1),
      })  # fmt: skip
  return found


def _speed(record: dict[str, Any]) -> float:
  return record["tokens_per_second"]


def _flops(found: list[dict[str, Any]], name: str) -> float:
  """GFLOP per token of a case."""
  own = next(r for r in found if r["case"] == name)
  return own["step_gflops"] / own["tokens_per_second"]


def table(found: list[dict[str, Any]]) -> str:
  """Markdown: medians over rounds."""

  def median(name: str, value: Any) -> float:
    return statistics.median(value(r) for r in found if r["case"] == name)

  rows = [
    "| case | tokens/s | GFLOP/s | product GFLOP/s | scaled | time |",
    "|---|---|---|---|---|---|",
  ]
  for name in dict.fromkeys(r["case"] for r in found):
    case = CASES[name]
    versus = beside = "-"
    official = OFFICIAL["tokens_per_second"].get(name)
    if official:
      scale = official / OFFICIAL["product_gflops"]
      ratio = median(name, lambda r, s=scale: _speed(r) / (s * r["product_gflops"]))
      versus = f"{ratio:.2f}"
    others = {r["round"]: _speed(r) for r in found if r["case"] == case.beside}
    if others:
      ratio = median(name, lambda r, o=others: o[r["round"]] / _speed(r))
      more = _flops(found, name) / _flops(found, case.beside)
      beside = f"{ratio:.2f} x {case.beside}, FLOPs {more:.2f} x"
    rows.append(
      f"| {name} | {median(name, _speed):,.0f} "
      f"| {median(name, lambda r: r['step_gflops']):.0f} "
      f"| {median(name, lambda r: r['product_gflops']):.0f} | {versus} | {beside} |"
    )
  return "\n".join(rows)


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--steps", type=int, default=2, help="in a round")
  parser.add_argument("--dry", action="store_true", help="write no records")
  args = parser.parse_args()
  names = args.cases.split(",")
  if set(names) - set(CASES):
    parser.error(f"--cases is {args.cases}; of {', '.join(CASES)}")
  # First, since it refuses a program without a name.
  about = {} if args.dry else describe()
  found = measure(names, args.rounds, args.steps)
  if not args.dry:
    for record in found:
      append(RESULTS / "xl_speed.jsonl", record | about)
  print(table(found))


if __name__ == "__main__":
  main()
