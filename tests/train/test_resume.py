"""A run that was killed anywhere and started again equals one that was left alone.

Equal means: every float of every line of training and evaluation, and every bit of the
state after the last step. Everything runs through the command line.
"""

import importlib.metadata
import json
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from cached_tx.memory import KINDS
from cached_tx.train.config import to_json
from cached_tx.train.loop import train
from tests.train import killing, toy
from tests.train.killing import Run

# A read that Orbax abandoned may end after the restore has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore:(?s)Exception ignored.*Event loop is closed"
  ":pytest.PytestUnraisableExceptionWarning"
)

KIND = "compressive"  # of the tests that every `make test` runs
STEPS = 30  # of toy.py
RESULT = killing.ROOT / "benchmarks" / "results" / "resume.json"
PROOF_KILLS = 5


class Whole(NamedTuple):
  """A run that nobody disturbed.

  Attributes:
    text: folder of its data.
    lines: of metrics.jsonl.
    digest: of its last checkpoint.
    starting: seconds until its first step was done.
  """

  text: Path
  lines: list
  digest: str
  starting: float


def undisturbed(folder: Path, kind: str) -> Whole:
  folder.mkdir(exist_ok=True)
  text = toy.write_text(folder / "text")
  run = Run(folder / "whole", kind, text)
  run.finish()
  first = next(r for r in run.records() if r.get("event") == "first_step")
  steps = [r["step"] for r in run.lines() if r["kind"] == "train"]
  assert steps == list(range(STEPS))
  return Whole(text, run.lines(), run.digest(), first["seconds"] + 2)  # 2 s of imports


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return undisturbed(tmp_path_factory.mktemp("whole"), KIND)


def assert_same(run: Run, whole: Whole):
  for got, want in zip(run.lines(), whole.lines, strict=True):
    assert got == want
  assert run.digest() == whole.digest


def test_the_table_has_every_kind():
  assert toy.MEMORIES.keys() == KINDS.keys()


def test_documents_begin_inside_segments(tmp_path):
  sizes = [f.stat().st_size for f in toy.write_text(tmp_path / "text").iterdir()]
  assert len({size % toy.SEGMENT for size in sizes}) == toy.SEGMENT


def test_kills_change_nothing(whole, tmp_path):
  run = Run(tmp_path, KIND, whole.text)
  kills = killing.kill_and_finish(run, ("saving", "training"), 0, whole.starting, STEPS)
  assert all(kill.last_line >= 0 for kill in kills)
  assert run.count("first_step") == 3 and run.count("end") == 1
  assert_same(run, whole)


def stop(run: Run, step: int) -> int:
  """Stops a run by SIGTERM when it has done a step, and returns where it is saved."""
  process = run.start()
  run.wait_for_step(process, step)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=killing.PATIENCE)
  assert process.returncode == 143, said
  saved = run.checkpoints()[-1]
  assert step < saved < STEPS and run.lines()[-1]["step"] == saved - 1
  assert f"stopped by a signal after step {saved} of {STEPS}" in said
  assert "the same command continues" in said
  return saved


def test_sigterm_saves_the_step_and_damage_costs_only_time(whole, tmp_path):
  run = Run(tmp_path, KIND, whole.text)
  stop(run, 3)
  newest = stop(run, toy.SAVE_EVERY + 1)
  flip_a_byte(run.workdir / "checkpoints" / str(newest))
  said = run.finish()
  assert f"checkpoint of step {newest} in" in said and "is damaged" in said
  assert (run.workdir / "checkpoints" / f"{newest}.damaged").is_dir()
  assert_same(run, whole)


def flip_a_byte(step: Path):
  files = [f for f in step.glob("state/ocdbt.process_*/d/*") if f.is_file()]
  path = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_another_config_is_refused(tmp_path):
  config = toy.get_config().copy_and_resolve_references().unlock()
  config.data.path = str(toy.write_text(tmp_path / "text"))
  (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  config.optimizer.peak, config.save.keep, config.model.width = 0.5, 9, 32
  with pytest.raises(ValueError, match="differs from the config given") as error:
    train(config, tmp_path)
  changed = [line.split(":")[0].strip() for line in str(error.value).split("\n")[1:-1]]
  assert changed == ["model.width", "optimizer.peak"]


PROVED: dict[str, dict] = {}


@pytest.fixture(scope="module")
def result():
  """Writes down what was proved, once every kind was."""
  yield PROVED
  if PROVED.keys() != KINDS.keys():
    return
  git = ["git", "-C", str(killing.ROOT), "rev-parse", "HEAD"]
  packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  body = {
    "what": "runs killed with SIGKILL at random moments and started again, compared"
    " with runs left alone: every float of metrics.jsonl, every bit of the last state",
    "command": "make prove ARGS=tests/train/test_resume.py",
    "commit": subprocess.check_output(git, text=True).strip(),
    "versions": {p: importlib.metadata.version(p) for p in packages},
    "python": platform.python_version(),
    "cpu": cpu(),
    "equal": all(kind["equal"] for kind in PROVED.values()),
    "kinds": PROVED,
  }
  RESULT.write_text(json.dumps(body, indent=1) + "\n")


def cpu() -> str:
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.split(":")[1].strip() for line in lines if "model name" in line]
  return (
    f"{names[0]} x {len(names)}" if names else f"{platform.machine()}, {sys.platform}"
  )


@pytest.mark.prove
@pytest.mark.parametrize("kind", toy.MEMORIES)
def test_kills_change_nothing_for_any_kind(kind, tmp_path, result, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # compiled as usual
  undisturbed(tmp_path / "cold", kind)  # compiles, so that starting lasts no longer
  whole = undisturbed(tmp_path / "warm", kind)
  rng = random.Random(kind)
  phases = [*killing.PHASES, *rng.choices(killing.PHASES, k=PROOF_KILLS - 3)]
  rng.shuffle(phases)
  run = Run(tmp_path / "killed", kind, whole.text)
  kills = killing.kill_and_finish(
    run, phases, rng.randrange(2**32), whole.starting, STEPS
  )
  lines = run.lines()
  result[kind] = {
    "equal": lines == whole.lines and run.digest() == whole.digest,
    "kills": [kill._asdict() for kill in kills],
    "losses_compared": sum(line["kind"] == "train" for line in lines),
    "evaluations_compared": sum(line["kind"] == "eval" for line in lines),
    "last_loss": lines[-2]["loss"],
    "state_sha256": run.digest(),
  }
  assert_same(run, whole)
