"""Checkpoints that are verified when they are read.

`Checkpoints` writes the whole train state with Orbax: asynchronously, and
atomically (a step directory appears under its own name only when it is
complete). Beside the arrays lies a JSON item with the caller's `meta`, the
metrics, and the shape, dtype and fingerprint of every array. Orbax restores an
array file with a flipped byte without a word; the fingerprints catch that, and
reading goes on to the next older step.

    WORKDIR/checkpoints/<step>/state      the arrays, nested dicts by path
    WORKDIR/checkpoints/<step>/meta       JSON
    WORKDIR/checkpoints/<step>.damaged    a step that failed, moved aside

Arrays of typed PRNG keys are stored as their uint32 data. Arrays without
elements are not stored (Orbax refuses them) but made anew from the target.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cached_tx.train.saved_step import (
  DamagedCheckpoint,
  Mismatch,
  StepReader,
  abandoned_reads_keep_quiet,
  pack,
)

_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run: keeps the last few and the best one.

  Every process of a run makes one and makes the same calls. As a context
  manager it waits, on leaving, for the save in flight.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep: int = 2,
    every: int = 0,
    read_only: bool = False,
  ):
    """Opens `workdir`/checkpoints, and removes what a killed save left there.

    Args:
      workdir: a folder that every process sees.
      keep: how many of the newest checkpoints to keep, at least 1. The one with
        the smallest metrics["loss"] is kept besides.
      every: steps between two checkpoints, for `due`; 0: never due.
      read_only: create, remove and rename nothing (evaluation of a run that may
        still be training).

    Raises:
      ValueError: keep < 1, every < 0, or `workdir` is a URL.
    """
    import orbax.checkpoint as ocp  # 0.8 s, which --help need not pay

    if keep < 1:
      raise ValueError(f"save.keep is {keep}: at least 1, or no run could resume")
    if every < 0:
      raise ValueError(f"save.every is {every}: at least 0 (0 saves at the end only)")
    if "://" in os.fspath(workdir):
      raise ValueError(
        f"workdir {workdir} is a URL: give a folder of a mounted file system that"
        " every process sees (--workdir)"
      )
    self.directory = Path(workdir).absolute() / "checkpoints"
    self._every = every
    self._read_only = read_only
    self._reader = StepReader(self.directory)
    self._losses: dict[int, tuple[Any, float]] = {}  # what was scored, and the loss
    if read_only:
      options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False
      )
    else:
      self.directory.mkdir(parents=True, exist_ok=True)
      options = ocp.CheckpointManagerOptions(
        preservation_policy=_LatestAndBest(keep, self.best_step),
        cleanup_tmp_directories=True,
      )
    with _silent("Given directory is read only"):  # it was asked for
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    for step in self.steps():
      self._remember_loss(step)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception):
    self.close()

  def close(self):
    """Waits for the save in flight and releases the threads."""
    self._manager.close()
    self._reader.close()

  def wait(self):
    """Blocks until the save in flight is on disk; raises what went wrong there."""
    self._manager.wait_until_finished()

  def due(self, step: int) -> bool:
    """Whether a checkpoint is due after `step` finished steps."""
    return self._every > 0 and step % self._every == 0

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, oldest first, the one in flight included."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest step that has a checkpoint, valid or not."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the smallest metrics["loss"] (of equals the newest).

    Only losses of what the newest one was measured on are compared: see `save`.
    """
    known = [s for s in self.steps() if s in self._losses]
    scored = [s for s in known if self._losses[s][0] == self._losses[known[-1]][0]]
    return -min((self._losses[s][1], -s) for s in scored)[1] if known else None

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts to write a checkpoint; its arrays may be donated at once.

    Blocks until the arrays are computed and copied to the host; the rest happens
    in a thread. Waits first for a save still in flight, and raises its error.

    Args:
      step: how many steps have been finished.
      state: any pytree of jax arrays (global ones, with several processes).
      meta: JSON data to come back on restore, such as the data position;
        "scored_on", where given, tells losses that cannot be compared apart.
      metrics: "loss", where given, decides which checkpoint is the best one.

    Returns:
      False, with nothing written, if that step has a checkpoint already.

    Raises:
      ValueError: a leaf is not a jax array; opened with read_only.
    """
    import orbax.checkpoint as ocp

    if self._read_only:
      raise ValueError(f"{self.directory} was opened with read_only=True: cannot save")
    if step in self.steps():
      return False
    tree, body = pack(state, meta, metrics or {})
    self._set_loss(step, body)
    arrays, text = ocp.args.PyTreeSave(tree), ocp.args.JsonSave(body)
    items = ocp.args.Composite(state=arrays, meta=text)
    return self._manager.save(step, args=items, force=True)

  def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]] | None:
    """Returns the newest valid state and its meta, or None without checkpoints.

    A damaged checkpoint is named in a warning and skipped; once an older one
    has proved valid it is moved to `<step>.damaged`, so that training can save
    that step anew.

    Args:
      target: the state's pytree with jax.ShapeDtypeStruct leaves that have a
        sharding (or arrays, whose values are not read). Any mesh will do.

    Raises:
      Mismatch: the checkpoint is of another state (path, shape or dtype).
      DamagedCheckpoint: there are checkpoints, but none is valid.
    """
    found = self._newest_valid(lambda step: self._reader.read(step, target))
    if found is None:
      return None
    step, damaged, result = found
    if damaged and not self._read_only:
      self._move_aside(damaged)
    _log.info("restored step %d from %s", step, self.directory)
    return result

  def restore_params(
    self,
    target: Any,
    step: int | None = None,
    name: str = "params",
  ) -> tuple[Any, dict[str, Any]]:
    """Returns one branch of a saved state, the parameters, and the meta.

    Args:
      target: the branch's pytree, as in `restore_latest`.
      step: which checkpoint; None: the newest valid one. `best_step` gives one.
      name: the branch, a field of the saved state.

    Raises:
      ValueError: no checkpoint.
      Mismatch: the stored branch has another path, shape or dtype.
      DamagedCheckpoint: that checkpoint, or with None every one, is damaged.
    """
    if step is not None and step not in self.steps():
      raise ValueError(
        f"{self.directory} has no checkpoint of step {step}; it has {self.steps()}"
      )
    if step is not None:
      result, problem = self._attempt(
        lambda s: self._reader.read(s, target, name), step
      )
      if problem:
        raise DamagedCheckpoint(f"step {step} of {self.directory}: {problem}")
      return result
    found = self._newest_valid(lambda s: self._reader.read(s, target, name))
    if found is None:
      raise ValueError(f"{self.directory} has no checkpoint: train first (--workdir)")
    return found[2]

  def _newest_valid(self, read: Callable[[int], Any]):
    """Returns (step, damaged newer steps, what `read` gave), or None."""
    problems: dict[int, str] = {}
    for step in self._descending():
      result, problem = self._attempt(read, step)
      if problem is None:
        return step, list(problems), result
      problems[step] = problem
      _log.warning(
        "checkpoint of step %d in %s is damaged, trying an older one: %s",
        step,
        self.directory,
        problem,
      )
    if not problems:
      return None
    lines = "".join(f"\n  step {step}: {text}" for step, text in problems.items())
    raise DamagedCheckpoint(
      f"no checkpoint in {self.directory} is valid, and starting anew would throw"
      f" the run away. Repair one, or give a new workdir (--workdir):{lines}"
    )

  def _descending(self) -> Iterator[int]:
    """The steps, newest first: those that process 0 sees."""
    self.wait()
    last = 2**31 - 1
    while True:
      step = max((s for s in self.steps() if s < last), default=-1)
      if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
      if step < 0:
        return
      yield step
      last = step

  def _attempt(self, read: Callable[[int], Any], step: int):
    """Returns (what `read` gave, None), or (None, what is wrong with the step)."""
    with abandoned_reads_keep_quiet():
      try:
        return read(step), None
      except Mismatch as error:
        raise Mismatch(f"step {step} of {self.directory}: {error}") from None
      except Exception as error:  # Orbax raises bare Exception for a damaged file
        text = (str(error).strip().splitlines() or [""])[0]
        text = text if len(text) <= 200 else f"{text[:200]}..."
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        return None, f"{type(error).__name__}: {text}{notes}"

  def _remember_loss(self, step: int):
    try:
      self._set_loss(step, self._reader.read_body(step))
    except Exception as error:  # restore_latest deals with it, or says why
      _log.info("no metrics of step %d: %s", step, error)

  def _set_loss(self, step: int, body: Mapping[str, Any]):
    self._losses.pop(step, None)
    loss = body["metrics"].get("loss", math.nan)
    if math.isfinite(loss):
      self._losses[step] = body["meta"].get("scored_on"), loss

  def _move_aside(self, steps: list[int]):
    if jax.process_index() == 0:
      for step in steps:
        path, copy = self.directory / f"{step}.damaged", 0
        while path.exists():
          copy += 1
          path = self.directory / f"{step}.damaged.{copy}"
        (self.directory / str(step)).rename(path)
        _log.warning("moved the damaged checkpoint of step %d to %s", step, path)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoints moved aside")
    for step in steps:
      self._losses.pop(step, None)
    self._manager.reload()


@contextlib.contextmanager
def _silent(words: str) -> Iterator[None]:
  """Keeps one warning of absl's logger from the screen."""
  logger, hide = logging.getLogger("absl"), lambda r: words not in r.getMessage()
  logger.addFilter(hide)
  try:
    yield
  finally:
    logger.removeFilter(hide)


class _LatestAndBest:
  """Orbax's preservation policy: the newest `keep` and the best.

  Orbax's own best_fn with max_to_keep deletes the newest checkpoints, and an
  unreadable metrics file of its own stops the manager from opening.
  """

  def __init__(self, keep: int, best_step: Callable[[], int | None]):
    self._keep = keep
    self._best_step = best_step

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    newest = sorted(c.step for c in checkpoints)[-self._keep :]
    return [c.step in newest or c.step == self._best_step() for c in checkpoints]
