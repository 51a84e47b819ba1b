"""What a run says: metrics.jsonl, TensorBoard, one progress line.

A line of metrics.jsonl is one JSON object:

    {"step": 7, "kind": "train", "loss": 2.25, ...}    after each logged step; with
                                                       "seconds" of training since the
                                                       line before, and in these
                                                       "tokens_per_second"
    {"step": 7, "kind": "eval", ...}                   an evaluation
    {"step": 7, "kind": "gauge", "gate/0/3": 0.5, ...} of layer 0, head 3: beside it,
                                                       where a model has any
    {"step": 0, "kind": "event", "event": "first_step", ...}

`step` counts from 0: after step s, s + 1 steps are finished, and a checkpoint of n
finished steps has the steps 0 to n - 1 behind it. Numbers are written in full, so
that equal lines mean equal bits.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cached_tx.files import write_atomically
from cached_tx.train.progress import Progress
from cached_tx.train.speed import Speed

_log = logging.getLogger(__name__)


class MetricsLog:
  """Collects the metrics of a run; only process 0 writes.

  As a context manager it reads what is pending and closes the files on leaving.

  Attributes:
    last: the newest training metrics that were read, as floats.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    total_steps: int,
    *,
    start: int = 0,
    every: int = 1,
    tokens_per_step: int = 0,
    bytes_per_token: float | None = 1.0,
    last_checkpoint: Callable[[], int | None] = lambda: None,
    tensorboard: bool = True,
  ):
    """Opens `workdir`/metrics.jsonl and cuts from it what will be done again.

    Args:
      workdir: holds metrics.jsonl and the folder tensorboard.
      total_steps: steps of the whole run.
      start: finished steps, 0 or those of the restored checkpoint. Training and
        evaluation lines of later steps are removed; events stay.
      every: steps between two training lines; the last step has one in any case.
      tokens_per_step: over all rows and processes, for tokens_per_second.
      bytes_per_token: turns "loss" (nats per token) into "bits_per_byte"; None if
        the task has no bytes.
      last_checkpoint: gives the step to name when the loss is not finite.
      tensorboard: write TensorBoard files too.
    """
    self.last: dict[str, float] = {}
    self._every, self._total = every, total_steps
    self._speed = Speed(tokens_per_step)
    self._bytes_per_token = bytes_per_token
    self._last_checkpoint = last_checkpoint
    self._pending: tuple[int, Mapping[str, Any]] | None = None
    self._created = time.monotonic()
    self._started = False
    self._file = self._board = self._progress = None
    if jax.process_index() == 0:
      path = Path(workdir) / "metrics.jsonl"
      path.parent.mkdir(parents=True, exist_ok=True)
      truncate_log(path, start)
      self._file = open(path, "a", buffering=1)  # noqa: SIM115, closed in close
      self._progress = Progress(total_steps, start)
      if tensorboard:
        from tensorboardX import SummaryWriter  # 0.8 s

        folder = Path(workdir) / "tensorboard"
        self._board = SummaryWriter(str(folder), purge_step=start or None)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, kind, error, traceback):
    try:
      if kind is None:
        self.flush()
    finally:
      self.close()

  def push(self, step: int, metrics: Mapping[str, Any]):
    """Takes the metrics of a step, and reads those of the step before.

    The device thus has work while the host waits for numbers. Only the first step
    is waited for, to learn how long it took.

    Args:
      step: counts from 0.
      metrics: scalars on the device; "loss" in nats per token.

    Raises:
      FloatingPointError: as `flush`, about the step before.
    """
    if not self._started:
      self._started = True
      jax.block_until_ready(metrics)
      seconds = time.monotonic() - self._created
      self.event("first_step", step=step, seconds=seconds)
      self._speed.begin(step + 1)
    self._read(metrics)
    self._pending = (step, metrics)

  def flush(self):
    """Reads and writes what is pending.

    Raises:
      FloatingPointError: its loss or a gradient norm is not finite; names the step
        and the last good checkpoint.
    """
    self._read({})

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For what is done between two steps and is no training: its time does not count.

    Raises:
      FloatingPointError: as `flush`, which comes first.
    """
    self.flush()
    self._speed.pause()
    yield
    self._speed.go_on()

  def _read(self, newer: Mapping[str, Any]):
    """Reads and writes what is pending; `newer` metrics are of the step after it."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(np.asarray(x)) for name, x in metrics.items()}
    self._speed.reached(step + 1 + _there(newer))
    self._check_finite(step, values)
    self.last = values = self._with_bits(values)
    if self._progress is not None:
      self._progress.speed = self._speed.total.rate
      self._progress.update(step + 1, self._summary(values))
    if (step + 1) % self._every == 0 or step + 1 == self._total:
      self._write("train", step, {**values, **self._measured()})

  def write(
    self,
    step: int,
    metrics: Mapping[str, Any],
    kind: str = "eval",
    *,
    show: bool = True,
  ):
    """Writes metrics at once, such as those of an evaluation after step `step`.

    Args:
      step: counts from 0.
      metrics: scalars; without any, nothing is written.
      kind: of the line.
      show: also to whoever watches the run.
    """
    self.flush()
    if not metrics:
      return
    values = {name: float(np.asarray(x)) for name, x in metrics.items()}
    values = self._with_bits(values)
    self._write(kind, step, values)
    if self._progress is not None and show:
      self._progress.note(f"step {step + 1} {kind}: {_text(values)}")

  def event(self, name: str, step: int = 0, **values: Any):
    """Writes a line about the run itself; `values` is JSON data."""
    self._line({"step": step, "kind": "event", "event": name, **values})

  def close(self):
    """Closes the files and ends the progress line; reads nothing more."""
    if self._progress is not None:
      self._progress.close()
    if self._board is not None:
      self._board.close()
    if self._file is not None:
      self._file.close()
    self._progress = self._board = self._file = None

  def _check_finite(self, step: int, values: Mapping[str, float]):
    bad = {
      name: value
      for name, value in values.items()
      if (name == "loss" or name.endswith("grad_norm")) and not math.isfinite(value)
    }
    if not bad:
      return
    self._write("train", step, values)
    good = self._last_checkpoint()
    where = "no checkpoint yet" if good is None else f"last checkpoint: step {good}"
    raise FloatingPointError(
      f"step {step}: {_text(bad)} is not finite, so training stops here; {where}."
      " A smaller optimizer.peak or optimizer.clip may help"
    )

  def _with_bits(self, values: dict[str, float]) -> dict[str, float]:
    if self._bytes_per_token and "loss" in values and "bits_per_byte" not in values:
      bits = values["loss"] / math.log(2) / self._bytes_per_token
      return {**values, "bits_per_byte": bits}
    return values

  def _summary(self, values: Mapping[str, float]) -> str:
    if "bits_per_byte" in values:
      return f"{values['bits_per_byte']:.4f} bits/byte"
    return f"loss {values['loss']:.4f}" if "loss" in values else ""

  def _measured(self) -> dict[str, float]:
    found = self._speed.take()
    if found.rate is None:
      return {}
    return {"tokens_per_second": round(found.rate, 1), "seconds": found.seconds}

  def _write(self, kind: str, step: int, values: Mapping[str, float]):
    self._line({"step": step, "kind": kind, **values})
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(f"{kind}/{name}", value, step)

  def _line(self, record: Mapping[str, Any]):
    if self._file is not None:
      clean = {k: None if _lost(v) else v for k, v in record.items()}
      self._file.write(json.dumps(clean, allow_nan=False) + "\n")


class CompileCounter:
  """Counts what XLA compiles while it is open, by the name of the function.

  Attributes:
    counts: compilations by function name.
    seconds: spent in them, all together.
    cached: how many of them the persistent compilation cache answered.
  """

  def __init__(self):
    self.counts: Counter[str] = Counter()
    self.seconds = 0.0
    self.cached = 0

  @property
  def number(self) -> int:
    """All compilations."""
    return self.counts.total()

  def __enter__(self) -> "CompileCounter":
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    jax.monitoring.register_event_listener(self._on_event)
    return self

  def __exit__(self, *exception):
    jax.monitoring.unregister_event_duration_listener(self._on_duration)
    jax.monitoring.unregister_event_listener(self._on_event)

  def _on_duration(self, event: str, duration_secs: float, **details: str | int):
    if event == "/jax/core/compile/backend_compile_duration":
      name = str(details.get("fun_name", ""))  # jit(name)
      self.counts[name.removeprefix("jit(").removesuffix(")")] += 1
      self.seconds += duration_secs

  def _on_event(self, event: str, **details: str | int):
    self.cached += event == "/jax/compilation_cache/cache_hits"


def read_log(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """The records of a metrics.jsonl; a line torn by a crash is left out."""
  with open(path) as file:
    for line in file:
      try:
        record = json.loads(line)
      except json.JSONDecodeError:
        _log.warning("left out an unreadable line of %s", path)
        continue
      yield record


def truncate_log(path: Path, start: int):
  """Removes the training and evaluation lines of steps from `start` on."""
  if not path.exists():
    return
  kept = [r for r in read_log(path) if r["kind"] == "event" or r["step"] < start]
  write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def _there(metrics: Mapping[str, Any]) -> bool:
  """Whether a step has been done, if there is one: a backend may not run ahead."""
  arrays: list[Any] = [x for x in metrics.values() if isinstance(x, jax.Array)]
  return bool(arrays) and all(x.is_ready() for x in arrays)


def _lost(value: Any) -> bool:
  """Whether JSON has no number for it."""
  return isinstance(value, float) and not math.isfinite(value)


def _text(values: Mapping[str, float]) -> str:
  return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
