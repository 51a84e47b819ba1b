"""Numbers that were published, to stand beside one's own.

Table 1 of Tay et al., 2021, arXiv:2011.04006 (accuracy in %; Path-X: none learned it),
and its efficiency table (byte-level text, batch 32, 4 x 4 TPU v3 chips). docs/lra.md
says what each of these models really computed.
"""

from collections.abc import Mapping
from typing import Any

TASKS = ("listops", "text", "retrieval", "image", "pathfinder32")
LENGTHS = (1024, 2048, 3072, 4096)

_ACCURACY = """
transformer  36.37 64.27 57.46 42.44 71.40
local        15.82 52.98 53.39 41.46 66.63
sparse       17.07 63.58 59.59 44.24 71.71
longformer   35.63 62.85 56.89 42.22 69.71
linformer    35.70 53.94 52.27 38.56 76.34
reformer     37.27 56.10 53.40 38.07 68.50
sinkhorn     33.67 61.20 53.83 41.23 67.45
synthesizer  36.99 61.68 54.67 41.61 69.45
bigbird      36.05 64.02 59.29 40.83 74.87
linear       16.13 65.90 53.09 42.34 75.30
performer    18.01 65.40 53.82 42.77 77.05
"""
_EFFICIENCY = """
transformer  8.1 4.9 2.3 1.4  .85 2.65 5.51 9.48
local        9.2 8.4 7.4 7.4  .42  .76 1.06 1.37
linformer    9.3 9.1 8.5 7.7  .37  .55  .99  .99
reformer     4.4 2.2 1.5 1.1  .48  .99 1.53 2.28
sinkhorn     9.1 7.9 6.6 5.3  .47  .83 1.13 1.48
synthesizer  8.7 5.7 6.6 1.9  .65 1.98 4.09 6.99
bigbird      7.4 3.9 2.7 1.5  .77 1.49 2.18 2.88
linear       9.1 9.3 8.6 7.8  .37  .57  .80 1.03
performer    9.5 9.4 8.7 8.0  .37  .59  .82 1.06
"""
# Long ListOps with a cache beside the attention: Zhang et al., 2024, Table 6.
CACHED_LISTOPS = {
  "transformer": (36.23, 37.40),
  "bigbird": (36.06, 37.45),
  "reformer": (37.27, 37.85),
}


def _rows(text: str) -> dict[str, tuple[float, ...]]:
  lines = [line.split() for line in text.strip().splitlines()]
  return {name: tuple(map(float, numbers)) for name, *numbers in lines}


ACCURACY: dict[str, dict[str, float]] = {
  model: dict(zip(TASKS, numbers, strict=True))
  for model, numbers in _rows(_ACCURACY).items()
}
STEPS_PER_SECOND: dict[str, dict[int, float]] = {
  model: dict(zip(LENGTHS, numbers[:4], strict=True))
  for model, numbers in _rows(_EFFICIENCY).items()
}
GIGABYTES: dict[str, dict[int, float]] = {
  model: dict(zip(LENGTHS, numbers[4:], strict=True))
  for model, numbers in _rows(_EFFICIENCY).items()
}


# Steps, batch and lengths of the rows that these numbers are of.
SETTINGS: dict[str, tuple[int, int, tuple[int, ...]]] = {
  "listops": (5_000, 32, (2000,)),
  "text": (20_000, 32, (1000, 2000, 3000, 4000)),
  "retrieval": (5_000, 32, (4000,)),
  "image": (35_000, 256, (1024,)),
  "pathfinder32": (62_400, 512, (1024,)),
}
_DEEP = 6  # layers of the experiments with caches


def task_of(name: str) -> str | None:
  """The task of the paper that a task of this package is; None of any other.

  Pathfinder that is made here is another set of images.
  """
  base = name.removesuffix("_archive").removesuffix("_official")
  made = name.startswith("pathfinder") and name == base
  return base if base in TASKS and not made else None


def accuracy(record: Mapping[str, Any]) -> tuple[float | None, bool]:
  """The published accuracy in %, and whether the run is of the published setting.

  Args:
    record: of a run: task, model, cached, layers, length, steps and batch.

  Returns:
    None where none was published. The setting is that of steps, batch and length, and
    with caches of layers.
  """
  task, model, cached = task_of(record["task"]), record["model"], record["cached"]
  if task is None:
    return None, False
  steps, batch, lengths = SETTINGS[task]
  same = record["steps"] == steps and record["batch"] == batch
  same = same and record["length"] in lengths
  deep = task == "listops" and record["layers"] == _DEEP
  if (cached or deep) and task == "listops" and model in CACHED_LISTOPS:
    return CACHED_LISTOPS[model][cached], same and deep
  if cached:
    return None, False
  return ACCURACY.get(model, {}).get(task), same
