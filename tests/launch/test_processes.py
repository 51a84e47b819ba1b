"""Several processes on this machine are one run: same numbers, one end for all."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cached_tx.train import processes
from cached_tx.train.processes import Place
from tests.kinds import some
from tests.train import toy
from tests.train.killing import PATIENCE, ROOT, Run, environment

pytestmark = pytest.mark.filterwarnings(
  "ignore:(?s)Exception ignored.*Event loop is closed"
  ":pytest.PytestUnraisableExceptionWarning"
)

LOCAL = ROOT / "launch" / "local.sh"
STEPS = 6
SMALL = (
  f"--config.steps={STEPS}",
  "--config.batch=8",
  "--config.eval.batch=8",
  "--config.model.layers=1",
  "--config.optimizer.muon=0.0",
  "--config.eval.every=3",
  "--config.save.every=3",
)


def run_of(workdir: Path, text: Path, launcher: tuple[str, ...], *options: str) -> Run:
  run = Run(workdir, "xl", text, *SMALL, *options)
  run.argv = [*launcher, *run.argv]
  return run


def two(workdir: Path, text: Path, *options: str) -> Run:
  """Two processes of four devices."""
  return run_of(workdir, text, (str(LOCAL), "2", "4"), *options)


def one(workdir: Path, text: Path, *options: str) -> Run:
  """One process of eight devices."""
  devices = "JAX_NUM_CPU_DEVICES=8"
  return run_of(workdir, text, ("env", devices), *options, "--distributed=off")


def stop_and_finish(run: Run) -> int:
  """Stops a run by SIGTERM in its first steps, and lets it continue to its end.

  The signal comes while the first step compiles: later, a run as short as this may
  end before all processes have agreed where to stop.

  Returns:
    The step at which it had stopped.
  """
  process = run.start()
  run.wait(process, (run.workdir / "config.json").exists)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=PATIENCE)
  assert process.returncode == 143, said
  saved = run.checkpoints()[-1]
  for number in range(2):
    assert f"[{number}] cached-tx: stopped by a signal after step {saved} of" in said
  run.finish()
  return saved


def assert_close(got: Run, want: Run, rtol: float):
  """Same lines, all numbers equal up to `rtol`."""
  for a, b in zip(got.lines(), want.lines(), strict=True):
    assert a.keys() == b.keys() and (a["step"], a["kind"]) == (b["step"], b["kind"])
    names = [name for name in a if isinstance(a[name], float)]
    np.testing.assert_allclose(
      [a[n] for n in names], [b[n] for n in names], rtol=rtol, err_msg=str(a)
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return toy.write_text(tmp_path_factory.mktemp("data") / "text")


# Largest difference measured over 30 steps: 1.8e-7. The sums over rows are made in
# another order: within each process first, then between them.
def test_two_processes_stopped_and_resumed_equal_one(text, tmp_path):
  alone, both = one(tmp_path / "one", text), two(tmp_path / "two", text)
  alone.finish()
  assert 1 <= stop_and_finish(both) < STEPS
  assert_close(both, alone, 1e-6)


@pytest.mark.prove
@pytest.mark.parametrize("axis", some(["data", "fsdp", "tensor"], ["fsdp"]))
def test_every_mesh(axis, text, tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # compiled as usual
  mesh = () if axis == "data" else (f"--config.mesh.{axis}=2",)
  alone, both = one(tmp_path / "one", text, *mesh), two(tmp_path / "two", text, *mesh)
  whole = two(tmp_path / "whole", text, *mesh)
  alone.finish()
  whole.finish()
  stop_and_finish(both)
  assert_close(both, alone, 1e-6)
  assert both.lines() == whole.lines() and both.digest() == whole.digest()


@pytest.mark.prove
def test_a_killed_process_ends_the_run(text, tmp_path):
  run = two(tmp_path, text, "--config.steps=100000")
  process = run.start()
  run.wait_for_step(process, 0)
  children = subprocess.check_output(
    ["pgrep", "-f", f"^[^ ]*python.*--workdir={tmp_path}"], text=True
  ).split()
  assert len(children) == 2
  began = time.monotonic()
  os.kill(int(children[-1]), signal.SIGKILL)
  process.communicate(timeout=30)
  assert process.returncode == 137 and time.monotonic() - began < 10


def local(count: str, devices: str, script: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [LOCAL, count, devices, "bash", "-c", script],
    capture_output=True,
    text=True,
    timeout=30,
    env=environment(),
  )


def test_local_tells_each_process_its_place():
  shown = "$PROCESS_ID $NUM_PROCESSES $JAX_NUM_CPU_DEVICES ${COORDINATOR_ADDRESS%:*}"
  done = local("3", "4", f"echo {shown}; echo oh >&2")
  assert done.returncode == 0
  lines = [f"[{i}] {i} 3 4 127.0.0.1" for i in range(3)]
  assert sorted(done.stdout.splitlines()) == lines
  assert sorted(done.stderr.splitlines()) == ["[0] oh", "[1] oh", "[2] oh"]


def test_local_ends_all_when_one_fails():
  began = time.monotonic()
  script = 'if [ $PROCESS_ID = 1 ]; then exit 7; fi; trap "" TERM; sleep 20'
  assert local("2", "1", script).returncode == 7
  assert time.monotonic() - began < 10


def test_local_passes_signals_on():
  script = 'trap "echo saved; exit 143" TERM; echo ready; sleep 20 & wait'
  process = subprocess.Popen(
    [LOCAL, "2", "1", "bash", "-c", script], stdout=subprocess.PIPE, text=True
  )
  ready = {process.stdout.readline(), process.stdout.readline()}
  assert ready == {"[0] ready\n", "[1] ready\n"}
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=10)
  assert sorted(said.splitlines()) == ["[0] saved", "[1] saved"]
  assert process.returncode == 143


@pytest.mark.parametrize("count,devices", [("0", "1"), ("2", "x"), ("", "1")])
def test_local_refuses_what_is_no_number(count, devices):
  done = local(count, devices, "true")
  assert done.returncode == 2 and "numbers from 1 on" in done.stderr


def test_place(monkeypatch):
  for name in processes.VARIABLES:
    monkeypatch.delenv(name, raising=False)
  assert processes.place("off") is None and processes.place("auto") is None
  assert processes.place("host:1234,2,1") == Place("host:1234", 2, 1)
  for name, value in zip(processes.VARIABLES, ("host:1", "4", "3"), strict=True):
    monkeypatch.setenv(name, value)
  assert processes.place("auto") == Place("host:1", 4, 3)
  assert processes.place("off") is None


@pytest.mark.parametrize(
  "choice", ["host:1,2,2", "host,2,1", "host:1,2", "on", "host:1,2,-1", ""]
)
def test_a_wrong_place_is_refused(choice):
  with pytest.raises(ValueError, match="--distributed="):
    processes.place(choice)


def test_half_a_place_is_refused(monkeypatch):
  for name in processes.VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="NUM_PROCESSES=2"):
    processes.place("auto")
  with pytest.raises(ValueError, match="--heartbeat=0"):
    processes.join("off", 0)


def test_alone_needs_no_cluster():
  code = (
    "from cached_tx.train import processes as p; p.join('auto', 9); print(p.joined())"
  )
  done = subprocess.run(
    ["env", *_no_cluster(), os.sys.executable, "-c", code],
    capture_output=True,
    text=True,
    env=environment(),
  )
  assert done.stdout.strip() == "False", done.stderr


def _no_cluster() -> list[str]:
  names = [n for n in os.environ if n.startswith(("SLURM_", "OMPI_"))]
  return [word for name in (*names, *processes.VARIABLES) for word in ("-u", name)]


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_scripts_are_bash(name):
  subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def test_scripts_name_no_hyperparameter():
  for path in (ROOT / "launch").iterdir():
    words = path.read_text()
    assert not any(
      f"--config.{key}" in words for key in ("optimizer", "model", "steps")
    )


def test_slurm_template():
  lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
  wanted = {"--requeue", "--open-mode=append", "--signal=TERM@120"}
  given = {line.split()[1] for line in lines if line.startswith("#SBATCH")}
  assert wanted <= given
  assert any(
    line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines
  )
  assert any("scontrol requeue" in line for line in lines)
