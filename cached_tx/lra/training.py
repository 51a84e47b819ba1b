"""Runs: training, and the number that is reported."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cached_tx.data.lra import ClassStream
from cached_tx.files import write_atomically
from cached_tx.lra.evaluation import ClassEvaluator
from cached_tx.lra.experiment import LraExperiment, identity
from cached_tx.lra.step import compiled_step
from cached_tx.train import processes, sharding
from cached_tx.train.config import to_json
from cached_tx.train.feed import Feed
from cached_tx.train.loop import Result, Work, run
from cached_tx.train.metrics import read_log
from cached_tx.train.run_config import check_config, lasting

RESULT = "result.json"


def train(config: ConfigDict, workdir: str | os.PathLike) -> Result:
  """Trains, or continues, the run of `workdir` until `config.steps`.

  The checkpoint with the smallest loss on the validation split is kept beside the
  newest; the test split is not read.

  Args:
    config: as of configs/lra; checked.
    workdir: as of `cached_tx.train.loop.train`.

  Raises:
    ValueError: a config that cannot be run, or a config or training data that differ
      from those of the workdir's checkpoints.
    FloatingPointError: a loss or norm is not finite.
  """
  experiment = LraExperiment(config)
  mesh, model = experiment.mesh, experiment.model  # refuses what does not fit, early
  processes.assert_same(json.dumps(to_json(config), sort_keys=True), "the config")
  check_config(workdir, to_json(config))
  feed, held = Feed(mesh, config.batch), config.eval
  own, length = experiment.examples("train"), config.task.length
  data = identity(own)
  processes.assert_same(json.dumps(data, sort_keys=True), "the training data")
  stream = ClassStream(
    own,
    rows=config.batch,
    length=length,
    seed=config.seed,
    shard=feed.shard,
    shards=feed.shards,
  )
  validation = experiment.examples("validation")
  with sharding.on(mesh):
    state, shardings, optimizer = experiment.prepare()
    whole = sharding.replicated(mesh)
    step = compiled_step(shardings, whole, model=model, optimizer=optimizer)
    evaluator = ClassEvaluator(
      model, validation, mesh=mesh, rows=held.batch, length=length, limit=held.examples
    )
    gauges = jax.jit(model.gauges, out_shardings=whole)

    def score(state: Any, done: int) -> dict[str, float]:
      del done
      found = evaluator(state.params, state.memory)
      return {"loss": found.loss, "accuracy": found.accuracy}

    about = {
      "data": data,
      "scored_on": {**identity(validation), "examples": held.examples},
    }
    places = experiment.task.inputs * length
    tokens = round(config.batch * min(own.about["tokens"] / len(own), places))
    work = Work(
      state=state,
      shardings=shardings,
      step=step,
      stream=stream,
      feed=feed,
      score=score,
      gauges=lambda state: gauges(state.params),
      about=about,
      tokens=tokens,
      bytes_per_token=None,
      score_last=held.every > 0,
    )
    return run(config, workdir, work)


def evaluate(
  workdir: str | os.PathLike, *, split: str = "test", step: int | None = None
) -> dict[str, Any]:
  """Scores the checkpoint that validation chose, on all of a split.

  Args:
    workdir: of a run.
    split: test, or another.
    step: of another checkpoint.

  Returns:
    JSON data: task, model, cached, layers, length, seed, step (of the checkpoint),
    chosen (by validation, as the newest, as the step that was named), trained (steps so
    far), steps (of the whole run), batch, split, loss, accuracy, examples, majority
    (the accuracy of always naming the split's most frequent class), selected_on_test
    (whether the validation split is the test split), parameters, settings (a digest of
    the config but for its seed), options (of the attention), data (SHA-256 of the
    split), device and speed. Of the test split and a finished run it is written to
    workdir/result.json too, unless a step was named.

  Raises:
    FileNotFoundError: no run there.
    ValueError: no such checkpoint, or none that is valid.
  """
  experiment = LraExperiment.of(workdir)
  config = experiment.config
  with sharding.on(experiment.mesh):
    params, memory, chosen = experiment.restore(workdir, step)
    own = experiment.examples(split)
    evaluator = ClassEvaluator(
      experiment.model,
      own,
      mesh=experiment.mesh,
      rows=config.eval.batch,
      length=config.task.length,
    )
    score = evaluator(params, memory)
  found = {
    "task": config.task.name,
    "model": _model(config),
    "cached": experiment.model.memory is not None,
    "layers": config.model.layers,
    "length": config.task.length,
    "seed": config.seed,
    "step": chosen.step,
    "chosen": chosen.by,
    "trained": chosen.newest,
    "steps": config.steps,
    "batch": config.batch,
    "split": split,
    **score._asdict(),
    "majority": own.majority,
    "selected_on_test": _same(experiment, "validation", "test"),
    "parameters": sum(a.size for a in jax.tree.leaves(params)),
    "settings": _settings(config),
    "options": config.attention.to_dict(),
    "data": own.about["sha256"],
    "device": jax.devices()[0].device_kind,
    **_speed(workdir),
  }
  finished = chosen.newest >= config.steps
  if split == "test" and step is None and finished and jax.process_index() == 0:
    write_atomically(Path(workdir) / RESULT, json.dumps(found, indent=2) + "\n")
  return found


def _same(experiment: LraExperiment, *splits: str) -> bool:
  return len({experiment.examples(split).about["sha256"] for split in splits}) == 1


def _settings(config: ConfigDict) -> str:
  """What runs of one row of a table share, as a few letters."""
  own = {key: value for key, value in lasting(to_json(config)).items() if key != "seed"}
  return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


def _model(config: ConfigDict) -> str:
  """The attention, and the memory of one that has a memory of its own."""
  memory = config.attention.get("memory")
  return config.model.attention + (f"-{memory.kind}" if memory else "")


def _speed(workdir: str | os.PathLike) -> dict[str, float | None]:
  """Real tokens per second of the last line of training that has them."""
  rate = None
  for record in read_log(Path(workdir) / "metrics.jsonl"):
    rate = record.get("tokens_per_second", rate)
  return {"tokens_per_second": rate}
