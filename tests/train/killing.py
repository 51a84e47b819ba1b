"""Runs training through the command line, kills it at random moments, and compares.

A random moment in seconds would mean something else on every machine, so a moment is
a phase and a place in it: a part of the time that starting took before; the line of a
step in metrics.jsonl; the appearance of an unfinished checkpoint. To each a random
delay of at most DELAY is added.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.train import toy

ROOT = Path(__file__).parents[2]
PHASES = ("starting", "training", "saving")
DELAY = 0.03  # seconds
PATIENCE = 300  # seconds
UNOPTIMISED = "--xla_backend_optimization_level=0"  # compiles in a third of the time


class Kill(NamedTuple):
  """What one kill did.

  Attributes:
    phase: of PHASES.
    last_line: the last step in metrics.jsonl at that time, -1 for none.
    saved: the newest finished checkpoint at that time, 0 for none.
    seconds: after the start of the process.
  """

  phase: str
  last_line: int
  saved: int
  seconds: float


class Run:
  """One workdir, and the command that trains in it.

  Attributes:
    workdir: of the run.
    argv: the command.
  """

  def __init__(self, workdir: Path, kind: str, text: Path, *options: str):
    self.workdir = workdir
    config = f"--config={Path(toy.__file__)}:{kind}"
    flags = [
      config,
      f"--config.data.path={text}",
      f"--workdir={workdir}",
      "--noreport",
      *options,
    ]
    self.argv = [sys.executable, "-m", "cached_tx.main", "train", *flags]

  def start(self) -> subprocess.Popen:
    """Starts it; what it says is in the pipe `stderr`."""
    return subprocess.Popen(
      self.argv, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )

  def finish(self) -> str:
    """Runs it to its end, and returns what it said."""
    process = self.start()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said

  def kill(self, phase: str, rng: random.Random, starting: float, step: int) -> Kill:
    """Starts it and kills it (SIGKILL) in a phase.

    Args:
      phase: of PHASES.
      rng: of the moment.
      starting: seconds that the first step of such a run comes after its start.
      step: when training or saving: not before the line of this step.
    """
    began = time.monotonic()
    old = self.unfinished()
    process = self.start()
    if phase == "starting":
      time.sleep(rng.uniform(0, starting))
    else:
      self.wait_for_step(process, step)
    if phase == "saving":
      self.wait(process, lambda: self.unfinished() - old)
    time.sleep(rng.uniform(0, DELAY))
    assert process.poll() is None, f"ended before the kill: {process.communicate()}"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = self.lines()
    return Kill(
      phase,
      lines[-1]["step"] if lines else -1,
      max(self.checkpoints(), default=0),
      round(time.monotonic() - began, 3),
    )

  def wait_for_step(self, process: subprocess.Popen, step: int) -> None:
    """Waits until this process has written the line of a step, or a later one."""
    starts = self.count("first_step")  # lines of an older process may still be there
    self.wait(process, lambda: self.count("first_step") > starts)
    self.wait(process, lambda: any(r["step"] >= step for r in self.lines()))

  def wait(self, process: subprocess.Popen, condition: Callable[[], Any]) -> None:
    """Looks at a condition until it holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
      assert time.monotonic() < deadline, self.argv
      time.sleep(0.002)

  def unfinished(self) -> set[str]:
    """Names of the checkpoints that are being written, or that a kill left."""
    found = self.workdir.glob("checkpoints/*tmp*")
    return {path.name for path in found}

  def checkpoints(self) -> list[int]:
    """The finished ones."""
    found = self.workdir.glob("checkpoints/*")
    return sorted(int(path.name) for path in found if path.name.isdigit())

  def records(self) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = self.workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]

  def count(self, event: str) -> int:
    """How many events of a name there are."""
    return sum(r.get("event") == event for r in self.records())

  def lines(self) -> list[dict[str, Any]]:
    """Training and evaluation, without the speed; floats are exact."""
    speed = {"seconds", "tokens_per_second"}
    return [
      {key: value for key, value in record.items() if key not in speed}
      for record in self.records()
      if record["kind"] != "event"
    ]

  def digest(self) -> str:
    """SHA-256 of every array of the newest checkpoint: parameters, optimiser, memory.

    Read without the code that training reads it with.
    """
    import orbax.checkpoint as ocp

    path = self.workdir / "checkpoints" / str(self.checkpoints()[-1]) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    where = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    arrays = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=where))
    handler.close()
    total = hashlib.sha256()
    for name, array in jax.tree_util.tree_leaves_with_path(arrays):
      total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def environment(**more: str) -> dict[str, str]:
  """Of the processes: like the tests', and with compiled Python files."""
  env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
  env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  env.setdefault("XLA_FLAGS", UNOPTIMISED)
  if env.pop("PYTHONDONTWRITEBYTECODE", ""):
    env["PYTHONPYCACHEPREFIX"] = str(ROOT / ".cache" / "python")
  return env


def kill_and_finish(
  run: Run, phases: Sequence[str], seed: int, starting: float, steps: int
) -> list[Kill]:
  """Kills a run once in every phase given, the steps growing, and lets it finish."""
  rng = random.Random(seed)
  at = sorted(rng.sample(range(1, steps - toy.SAVE_EVERY), len(phases)))
  kills = [
    run.kill(phase, rng, starting, step) for phase, step in zip(phases, at, strict=True)
  ]
  run.finish()
  return kills
