"""Accuracies on the Long Range Arena at equal steps: real runs, and many of them.

python -m benchmarks.lra_results                          all suites, seed 0
python -m benchmarks.lra_results --suites listops --seeds 0,1 --jobs 1
python -m benchmarks.lra_results --list

Every run is `cached-tx lra train` in a process of its own, on one core; as many work at
once as there are cores. Runs stand in runs/lra_results/SUITE/MODEL/SEED. What was
stopped goes on where it was when the command is given again; what has finished is left
alone. A finished run is a line of benchmarks/results/lra_results.jsonl, of which
`cached-tx lra table --runs FILE` makes tables and plots.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import ROOT, describe
from benchmarks.records import RESULTS, append, lines

FILE = RESULTS / "lra_results.jsonl"
FIVE = ("transformer", "bigbird", "reformer", "linear", "performer")


SHORT = (
  "steps=300", "batch=8", "optimizer.warmup=50", "log_every=25",
  "eval.every=150", "eval.batch=20", "save.every=150",
)  # fmt: skip


class Suite(NamedTuple):
  """Runs to be compared: equal steps, each model also with a cache.

  Attributes:
    config: of configs/lra.
    task: its data.
    words: of the mode, after the model.
    changes: of the config, key=value.
    models: by name.
  """

  config: str
  task: str
  words: tuple[str, ...] = ()
  changes: tuple[str, ...] = ()
  models: tuple[str, ...] = FIVE


# Sized for two cores and about 90 minutes.
SUITES = {
  "listops": Suite("listops", "listops", ("mini",)),
  "text_demo": Suite("text_demo", "text_demo", changes=(*SHORT, "optimizer.rate=0.02")),
  "image_demo": Suite("image_demo", "image_demo", changes=SHORT),
  "pathfinder32": Suite(
    "pathfinder32",
    "pathfinder32",
    changes=(*SHORT, "eval.examples=1000"),
    # The other models take long over the 20,000 images of the test split.
    models=("linear", "performer"),
  ),
}


class Run(NamedTuple):
  """One training.

  Attributes:
    suite: its name in SUITES.
    model: by name.
    cached: whether it has a cache.
    seed: of everything.
  """

  suite: str
  model: str
  cached: bool
  seed: int

  @property
  def name(self) -> str:
    """For people, and for its folder."""
    return f"{self.suite}/{self.model}{'-cached' * self.cached}/{self.seed}"

  @property
  def asked(self) -> list[str]:
    """The mode of the config, and what is changed in it."""
    suite = SUITES[self.suite]
    mode = ",".join([self.model, *["cached"] * self.cached, *suite.words])
    return [mode, *suite.changes]

  def command(self, folder: Path, data: Path) -> list[str]:
    """What trains and evaluates it."""
    suite = SUITES[self.suite]
    mode, *changes = self.asked
    return [
      *(sys.executable, "-m", "cached_tx.main", "lra", "train"),
      f"--config={ROOT / 'configs/lra' / suite.config}.py:{mode}",
      *(f"--config.{change}" for change in changes),
      f"--config.task.path={data}",
      f"--config.seed={self.seed}",
      f"--workdir={folder / self.name}",
      "--distributed=off",
    ]


def planned(suites: list[str], seeds: list[int]) -> Iterator[Run]:
  """All of the first seed before any of the next."""
  for seed in seeds:
    for suite in suites:
      for model in SUITES[suite].models:
        for cached in (False, True):
          yield Run(suite, model, cached, seed)


def prepared(tasks: set[str], data: Path) -> None:
  """Makes the data that are not there yet."""
  for task in sorted(tasks):
    words = ["prepare", "--task", task, "--out", str(data)]
    command = [sys.executable, "-m", "cached_tx.main", "lra", *words]
    subprocess.run(command, cwd=ROOT, check=True)


def trained(run: Run, folder: Path, data: Path, core: int) -> float:
  """Trains on one core, with its own log; returns seconds of all calls so far.

  Raises:
    RuntimeError: it failed; names the log.
  """
  home = folder / run.name
  home.mkdir(parents=True, exist_ok=True)
  begin = time.perf_counter()
  with open(home / "log.txt", "a") as log:
    # The threads of XLA are as many as the cores that a process may use.
    done = subprocess.run(
      ["taskset", "--cpu-list", str(core), *run.command(folder, data)],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdout=log,
      stderr=subprocess.STDOUT,
      check=False,
    )
  with open(home / "seconds.txt", "a") as calls:
    calls.write(f"{time.perf_counter() - begin}\n")
  if done.returncode:
    raise RuntimeError(f"{run.name} failed ({done.returncode}): see {home / 'log.txt'}")
  return sum(map(float, (home / "seconds.txt").read_text().split()))


def recorded(run: Run) -> bool:
  """Whether a line of the results is this run, asked for as it is now."""
  own = run.name, run.asked
  return any((record["run"], record["asked"]) == own for record in lines(FILE))


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--suites", default=",".join(SUITES))
  parser.add_argument("--seeds", default="0")
  parser.add_argument("--jobs", type=int, default=0, help="at once; 0: one per core")
  parser.add_argument("--runs", default=str(ROOT / "runs/lra_results"))
  parser.add_argument("--data", default=str(ROOT / "runs/data"))
  parser.add_argument("--list", action="store_true", help="print the runs only")
  given = parser.parse_args()
  suites = given.suites.split(",")
  if unknown := [name for name in suites if name not in SUITES]:
    parser.error(f"--suites has {unknown[0]!r}; there are {', '.join(SUITES)}")
  runs = list(planned(suites, [int(seed) for seed in given.seeds.split(",")]))
  left = [run for run in runs if not recorded(run)]
  for run in runs:
    print(f"{'left' if run in left else 'done'}  {run.name}")
  if given.list or not left:
    return
  cores = sorted(os.sched_getaffinity(0))
  if not 0 <= given.jobs <= len(cores):
    parser.error(f"--jobs is {given.jobs}; there are {len(cores)} cores")
  if not shutil.which("taskset"):
    parser.error("taskset (of util-linux), which keeps a run on its core, is missing")
  folder, data = Path(given.runs).absolute(), Path(given.data).absolute()
  about = describe()
  prepared({SUITES[run.suite].task for run in left}, data)
  cores = cores[: given.jobs or None]
  free: queue.Queue[int] = queue.Queue()
  for core in cores:
    free.put(core)

  def work(run: Run) -> None:
    core = free.get()
    try:
      seconds = trained(run, folder, data, core)
    finally:
      free.put(core)
    found: dict[str, Any] = json.loads((folder / run.name / "result.json").read_text())
    note = {"run": run.name, "asked": run.asked, "seconds": seconds, "cores_used": 1}
    append(FILE, found | note | about)
    percent = 100 * found["accuracy"]
    print(f"{run.name}: {percent:.2f} % in {seconds / 60:.1f} minutes", flush=True)

  with ThreadPoolExecutor(len(cores)) as pool:
    for done in [pool.submit(work, run) for run in left]:
      done.result()


if __name__ == "__main__":
  main()
