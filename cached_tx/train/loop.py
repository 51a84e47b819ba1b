"""The training loop. It names no variant."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from cached_tx.data import Batches, ByStep, Tokens, TrainStream, counts, tokenize
from cached_tx.train import processes, sharding
from cached_tx.train.checkpoint import Checkpoints
from cached_tx.train.config import to_json
from cached_tx.train.evaluation import Evaluator, Reading
from cached_tx.train.experiment import Experiment
from cached_tx.train.feed import Feed
from cached_tx.train.metrics import CompileCounter, MetricsLog
from cached_tx.train.preemption import Preemption
from cached_tx.train.run_config import check_config, write_config
from cached_tx.train.same_data import check_data, identity
from cached_tx.train.state import TrainState, configured_optimizer, init_state
from cached_tx.train.step import compiled_step

_log = logging.getLogger(__name__)


class Result(NamedTuple):
  """How a run ended.

  Attributes:
    state: after the last step that was done.
    finished: False if a signal ended the run early.
    done: steps that this call has done; 0 where all were done before.
    recompilations: of the training step, after the first step.
  """

  state: TrainState
  finished: bool
  done: int
  recompilations: int


def due(step: int, every: int) -> bool:
  """Whether something is due after `step` finished steps; 0 means never."""
  return every > 0 and step % every == 0


def train(config: ConfigDict, workdir: str | os.PathLike) -> Result:
  """Trains, or continues, the run of `workdir` until `config.steps`.

  Parameters, optimiser, memory, step and thereby dropout and the position of the
  input are saved together, so a run that was killed continues bit for bit.

  Args:
    config: as of configs/; checked.
    workdir: gets config.json (once the run is known to begin), checkpoints,
      metrics.jsonl, tensorboard.

  Raises:
    ValueError: a config that cannot be run, or a config or training data that differ
      from those of the workdir's checkpoints.
    FloatingPointError: a loss or norm is not finite.
  """
  experiment = Experiment(config)
  processes.first_then_others(lambda: experiment.tokenizer)  # may count all words
  mesh, _ = experiment.mesh, experiment.model  # refuses what does not fit, early
  processes.assert_same(json.dumps(to_json(config), sort_keys=True), "the config")
  check_config(workdir, to_json(config))
  batch, length = config.batch, config.segment * config.segments
  feed = Feed(mesh, batch)
  tokens = _tokens(experiment, "train")
  data = identity(tokens)
  processes.assert_same(json.dumps(data, sort_keys=True), "the training data")
  stream = TrainStream(
    tokens,
    rows=batch,
    length=length,
    seed=config.seed,
    shard=feed.shard,
    shards=feed.shards,
  )
  with sharding.on(mesh):
    return run(config, workdir, _work(experiment, stream, feed, data))


def prepare(experiment: Experiment) -> tuple[TrainState, TrainState, Callable]:
  """A state at step 0, its shardings, and the jitted step from (state, batch).

  To be called, like the step, within `sharding.on` the experiment's mesh.
  """
  config, model, mesh = experiment.config, experiment.model, experiment.mesh
  optimizer, groups = configured_optimizer(config, model)
  ema = config.optimizer.ema
  state, shardings = init_state(
    model, optimizer, seed=config.seed, batch=config.batch, ema=ema, mesh=mesh
  )
  step = compiled_step(
    shardings,
    sharding.replicated(mesh),
    model=model,
    optimizer=optimizer,
    labels=groups,
    ema=ema,
  )
  return state, shardings, step


class Work(NamedTuple):
  """What is done in a run, whatever is trained.

  Attributes:
    state: at step 0.
    shardings: of it.
    step: jitted, state and batch to state and metrics; "train_step" by name.
    stream: what this process reads, by step: see `cached_tx.data.Batches`.
    feed: takes a batch to the devices.
    score: after so many steps, what the held-out data say of a state; "loss" chooses
      the best checkpoint.
    gauges: of a state; see `MetricsLog`.
    about: kept in each checkpoint; "data" is the identity of the training data.
    tokens: of a step, over all rows.
    bytes_per_token: as of `MetricsLog`.
    score_last: whether the last step is scored too where eval.every does not meet it.
  """

  state: TrainState
  shardings: TrainState
  step: Callable
  stream: ByStep
  feed: Feed
  score: Callable[[TrainState, int], dict[str, float]]
  gauges: Callable[[TrainState], Any]
  about: dict[str, Any]
  tokens: int
  bytes_per_token: float | None
  score_last: bool = False


def _work(
  experiment: Experiment, stream: TrainStream, feed: Feed, data: dict[str, Any]
) -> Work:
  config, model = experiment.config, experiment.model
  state, shardings, step = prepare(experiment)
  held_out = _tokens(experiment, "validation")
  validation = Reading(
    model,
    held_out,
    mesh=experiment.mesh,
    rows=config.eval.batch,
    segments=config.eval.segments,
  )
  evaluator = Evaluator(model, validation)
  whole = sharding.replicated(experiment.mesh)
  gauges = jax.jit(model.gauges, out_shardings=whole)
  best = lambda state: state.ema if config.optimizer.ema else state.params
  return Work(
    state,
    shardings,
    step,
    stream,
    feed,
    lambda s, done: {"loss": evaluator(best(s), steps=done)["kept"].loss},
    lambda s: gauges(best(s)),
    {
      "data": data,
      "tokenizer": experiment.tokenizer.identity,
      "scored_on": {**identity(held_out), **config.eval.to_dict(), "every": None},
    },
    config.batch * stream.length,
    _bytes_per_token(experiment, validation),
  )


def run(config: ConfigDict, workdir: str | os.PathLike, work: Work) -> Result:
  """Does the steps that are left, from the newest valid checkpoint on.

  To be called within `sharding.on` the mesh of the work's state.

  Args:
    config: its keys steps, log_every, eval.every and save; it is written to workdir.
    workdir: as of `train`.
    work: what is done. Its state is donated.

  Raises:
    ValueError: the checkpoints are of other training data.
    FloatingPointError: a loss or norm is not finite.
  """
  state, save, data = work.state, config.save, work.about["data"]
  with Checkpoints(workdir, keep=save.keep, every=save.every) as checkpoints:
    target = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      state,
      work.shardings,
    )
    restored = checkpoints.restore_latest(target)
    if restored is not None:
      state, meta = restored
      check_data(meta.get("data"), data)
      _log.info("continuing at step %d", int(state.step))
    start = int(state.step)
    if start >= config.steps:
      return Result(state, True, 0, 0)
    write_config(workdir, to_json(config))
    scores: dict[str, float] = {}

    def keep(step: int) -> None:
      with log.paused():  # raises on a non-finite loss or norm, before it is saved
        checkpoints.save(step, state, {"step": step, **work.about}, scores or None)

    with (
      Preemption() as preemption,
      CompileCounter() as compiled,
      Batches(work.stream, start=start) as batches,
      MetricsLog(
        workdir,
        config.steps,
        start=start,
        every=config.log_every,
        tokens_per_step=work.tokens,
        bytes_per_token=work.bytes_per_token,
        last_checkpoint=checkpoints.latest_step,
      ) as log,
    ):
      step, first = start, 0
      for step in range(start + 1, config.steps + 1):
        batch = work.feed(next(batches))
        if step == start + 1:
          processes.compile_together(work.step, state, batch)
        state, metrics = work.step(state, batch)
        log.push(step - 1, metrics)
        first = first or compiled.counts["train_step"]
        scores = {}
        last = work.score_last and step == config.steps
        if due(step, config.eval.every) or last:
          with log.paused():
            scores = work.score(state, step)
            log.write(step - 1, scores)
            log.write(step - 1, work.gauges(state), kind="gauge", show=False)
        leaving = preemption.reached(step)
        if due(step, save.every) or leaving or step == config.steps:
          keep(step)
        if leaving:
          break
      again = compiled.counts["train_step"] - first
      log.event(
        "end", step=step, recompilations=again, compile_seconds=compiled.seconds
      )
    return Result(state, step == config.steps, step - start, again)


def _tokens(experiment: Experiment, split: str) -> Tokens:
  return processes.first_then_others(
    lambda: tokenize(experiment.documents(split), experiment.tokenizer)
  )


def _bytes_per_token(experiment: Experiment, validation: Reading) -> float:
  """1 for bytes; else measured on the validation split."""
  if experiment.tokenizer.name == "bytes":
    return 1.0
  size = counts(experiment.documents("validation")).bytes
  return size / validation.batches.targets
