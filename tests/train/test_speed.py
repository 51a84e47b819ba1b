"""How fast a run trains: one number, of training alone."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from cached_tx.report import speed
from cached_tx.train.metrics import MetricsLog, read_log
from cached_tx.train.speed import Measured, Speed
from tests.trained import tiny

TOKENS = 128  # of a step of `tiny`


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when they are added."""
  own = SimpleNamespace(now=100.0)
  fake = SimpleNamespace(monotonic=lambda: own.now)
  monkeypatch.setattr("cached_tx.train.speed.time", fake)
  return own


def test_only_steps_that_are_done_count(clock):
  own = Speed(TOKENS)
  own.reached(1)  # before anything has begun
  own.begin(done=1)
  clock.now += 1
  own.reached(1)  # not done yet: its time counts when it is
  assert own.take() == Measured() and own.total.rate is None
  clock.now += 3
  own.reached(3)
  assert own.take() == Measured(2 * TOKENS, 4.0)
  own.pause()
  clock.now += 50
  own.reached(4)
  own.go_on()
  clock.now += 1
  own.reached(4)
  assert own.take() == Measured(TOKENS, 1.0)
  assert own.total == Measured(3 * TOKENS, 5.0) and own.total.rate == 3 * TOKENS / 5


@pytest.mark.parametrize("every", [1, 2, 4, 9])
def test_progress_lines_and_report_agree(every, clock, tmp_path, capfd):
  """6 steps of half a second; compiling, an evaluation and a checkpoint of minutes."""
  folder = tmp_path
  with MetricsLog(
    folder, 6, every=every, tokens_per_step=TOKENS, tensorboard=False
  ) as log:
    for step in range(6):
      clock.now += 60 if step == 0 else 0.5
      log.push(step, {"loss": jnp.float32(1).block_until_ready()})
      if step in (2, 5):
        with log.paused():
          clock.now += 600
          log.write(step, {"loss": 2.0})
  lines = [r for r in read_log(folder / "metrics.jsonl") if "seconds" in r]
  train = [r for r in lines if r["kind"] == "train"]
  assert sum(r["seconds"] for r in train) == pytest.approx(2.5)
  assert {r["tokens_per_second"] for r in train} == {2 * TOKENS}
  assert speed(tiny(), folder)["tokens_per_second"] == pytest.approx(2 * TOKENS)
  assert f"6/6  1.4427 bits/byte  {2 * TOKENS} tokens/s" in capfd.readouterr().err


def test_one_step_has_no_speed(tmp_path, capfd):
  with MetricsLog(tmp_path, 1, tokens_per_step=TOKENS, tensorboard=False) as log:
    log.push(0, {"loss": jnp.float32(1)})
  (line,) = [r for r in read_log(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
  assert not {"seconds", "tokens_per_second"} & line.keys()
  assert speed(tiny(), tmp_path)["tokens_per_second"] is None
  assert "tokens/s" not in capfd.readouterr().err
