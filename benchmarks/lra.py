"""Steps per second and memory of the Long Range Arena's models, by length of the rows.

python -m benchmarks.lra                                     all models, 1,024 to 4,096
python -m benchmarks.lra --models transformer,performer --lengths 1024,4096
python -m benchmarks.lra --pass attention --lengths 1024,4096,16384   one layer alone
python -m benchmarks.lra --growth                        exponents of what that left
python -m benchmarks.lra --models transformer-dense,sparse-root      other options

The model is that of configs/lra/text.py, the rows are random bytes, without padding; a
step is forward, backward and the optimiser's. Models take turns in rounds, and a number
is the median of these. Memory is what the compiled program needs: arguments,
results and what is between. Records are lines of benchmarks/results/lra.jsonl, of which
`cached-tx lra table --efficiency FILE` makes a table; those of one layer, of
lra_attention.jsonl.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import ROOT, describe
from benchmarks.records import RESULTS, append, lines
from benchmarks.timing import matmul_rate
from cached_tx.data.lra import ClassBatch
from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.lra.experiment import LraExperiment
from cached_tx.lra.step import compiled_step
from cached_tx.train import sharding
from cached_tx.types import Segment

# Beside the models of the table: the same with other options.
VARIANTS: dict[str, dict[str, Any]] = {
  "transformer-dense": {"kernel": "dense"},  # scores of all pairs, as published
  "sparse-root": {"block": 0},  # blocks of the length's root, as in its paper
}
NAMES = {name: f"recurrent-{name}" for name in ("xl", "compressive")}  # in results
MODELS = tuple(name for name in ATTENTIONS if name != "recurrent")
LENGTHS = (1024, 2048, 3072, 4096)
FILES = {"step": "lra.jsonl", "attention": "lra_attention.jsonl"}


def experiment(name: str, length: int, batch: int) -> LraExperiment:
  """The published model for text, with rows of so many bytes."""
  spec = importlib.util.spec_from_file_location("text", ROOT / "configs/lra/text.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  model, _, words = name.partition(",")
  mode = ",".join([model.partition("-")[0], *([words] if words else [])])
  config = module.get_config(mode).unlock()
  config.attention.update(VARIANTS.get(model, {}))
  config.task.length, config.batch = length, batch
  return LraExperiment(config.lock(), sharding.one_device())


class Step:
  """A training step, compiled; it has run once.

  Attributes:
    peak: bytes that the program needs.
  """

  def __init__(self, name: str, length: int, batch: int):
    own = experiment(name, length, batch)
    with sharding.on(own.mesh):
      self._state, shardings, optimizer = own.prepare()
      whole = sharding.replicated(own.mesh)
      step = compiled_step(shardings, whole, model=own.model, optimizer=optimizer)
      rng = np.random.default_rng(0)
      tokens = rng.integers(1, 257, (batch, 1, length), dtype=np.int32)
      self._batch = ClassBatch(
        jnp.asarray(tokens),
        jnp.ones(tokens.shape, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(batch),
      )
      self._run = step.lower(self._state, self._batch).compile()
    self.peak = _peak(self._run)
    self.seconds()

  def seconds(self) -> float:
    """Of one step."""
    begin = time.perf_counter()
    self._state, metrics = self._run(self._state, self._batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - begin


class Attention:
  """One attention layer of that model, forward and backward, compiled; it has run once.

  Attributes:
    peak: bytes that the program needs.
  """

  def __init__(self, name: str, length: int, batch: int):
    own = experiment(name, length, batch).model
    layer, width = own.attentions()[0], own.width
    given: tuple[Any, ...] = (Segment(jnp.zeros((batch, length), bool)),)
    if own.memory is not None:
      given = (layer.initial_state(), *given)
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    make = jax.jit(lambda key: layer.init(key, x, *given))
    params = sharding.unboxed(make(jax.random.key(1)))

    def total(params: Any, x: Any) -> Any:
      found = layer.apply(params, x, *given)
      return ((found if own.memory is None else found[0]) ** 2).sum()

    self._args = params, x
    slope = jax.jit(jax.grad(total, argnums=(0, 1)))
    self._run = slope.lower(*self._args).compile()
    self.peak = _peak(self._run)
    self.seconds()

  def seconds(self) -> float:
    """Of one forward and backward pass."""
    begin = time.perf_counter()
    jax.block_until_ready(self._run(*self._args))
    return time.perf_counter() - begin


def _peak(compiled: Any) -> int:
  found = compiled.memory_analysis()
  sizes = found.temp_size_in_bytes, found.argument_size_in_bytes
  return sum(sizes) + found.output_size_in_bytes - found.alias_size_in_bytes


def measure(
  names: list[str], length: int, batch: int, rounds: int, what: str
) -> list[dict[str, Any]]:
  """A record for each model: its median, in rounds in which all take turns.

  Args:
    names: models, with ,cached after a name for a cache.
    length: of the rows.
    batch: rows.
    rounds: how many.
    what: step, of training, or attention, of one layer.
  """
  kind = {"step": Step, "attention": Attention}[what]
  cases = {name: kind(name, length, batch) for name in names}
  times: dict[str, list[float]] = {name: [] for name in names}
  rates = []
  for _ in range(rounds):
    rates.append(matmul_rate())
    for name, case in cases.items():
      times[name].append(case.seconds())
  return [
    {
      "pass": what,
      "model": NAMES.get(name.partition(",")[0], name.partition(",")[0]),
      "cached": name.endswith(",cached"),
      "length": length,
      "batch": batch,
      "steps_per_second": 1 / statistics.median(times[name]),
      "peak_bytes": case.peak,
      "rounds": rounds,
      "product_gflops": statistics.median(rates),
    }
    for name, case in cases.items()
  ]


def growth(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """How time and memory of one layer grow with the length, by model.

  Args:
    records: of the pass "attention"; of equal model and length the last counts.

  Returns:
    Of each model "lengths", "seconds" and "bytes" (in the order of lengths), and the
    exponents "time" and "memory": slopes of the logarithms by least squares.
  """
  newest: dict[str, dict[int, dict[str, Any]]] = {}
  for record in records:
    name = record["model"] + (" + cache" if record["cached"] else "")
    newest.setdefault(name, {})[record["length"]] = record
  found = {}
  for model, by_length in newest.items():
    lengths = sorted(by_length)
    own = [by_length[length] for length in lengths]
    seconds = [1 / record["steps_per_second"] for record in own]
    peaks = [record["peak_bytes"] for record in own]
    fit = lambda values, at=lengths: np.polyfit(np.log(at), np.log(values), 1)
    found[model] = {
      "lengths": lengths,
      "seconds": seconds,
      "bytes": peaks,
      "time": float(fit(seconds)[0]),
      "memory": float(fit(peaks)[0]),
    }
  return found


def growth_markdown(found: dict[str, dict[str, Any]]) -> str:
  """The table of docs/lra.md."""
  lengths = sorted({n for own in found.values() for n in own["lengths"]})
  names = [f"{n:,}" for n in lengths]
  rows = ["| attention | " + " | ".join(names) + " | time grows as | memory as |"]
  rows.append("|---|" + "---|" * (len(lengths) + 2))
  for model, own in found.items():
    at = dict(zip(own["lengths"], own["seconds"], strict=True))
    cells = [f"{1000 * at[n]:,.0f}" if n in at else "-" for n in lengths]
    cells += [f"L^{own['time']:.2f}", f"L^{own['memory']:.2f}"]
    rows.append(f"| {model} | " + " | ".join(cells) + " |")
  return "\n".join(rows)


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", default=",".join(MODELS))
  parser.add_argument("--cached", action="store_true", help="each with a cache too")
  parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--pass", dest="what", default="step", choices=FILES)
  text = "print how measured time and memory of one layer grow; measure nothing"
  parser.add_argument("--growth", action="store_true", help=text)
  given = parser.parse_args()
  if given.growth:
    print(growth_markdown(growth(lines(RESULTS / FILES["attention"]))))
    return
  names = given.models.split(",")
  known = (*MODELS, *NAMES, *VARIANTS)
  unknown = [name for name in names if name not in known]
  if unknown:
    parser.error(f"--models has {unknown[0]!r}; there are {', '.join(known)}")
  if given.cached:
    names += [f"{name},cached" for name in names]
  about = describe()
  for length in map(int, given.lengths.split(",")):
    found = measure(names, length, given.batch, given.rounds, given.what)
    for record in found:
      print(record, flush=True)
      append(RESULTS / FILES[given.what], record | about)


if __name__ == "__main__":
  main()
