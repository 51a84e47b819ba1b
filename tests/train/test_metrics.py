"""The record of a run: complete, exact, continuous, and it stops at a NaN."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.train.metrics import CompileCounter, MetricsLog, read_log


def lines(workdir, kind="train"):
  return [r for r in read_log(workdir / "metrics.jsonl") if r["kind"] == kind]


def loss(step):
  return np.float32(5) / np.float32(3 + step)


def run(workdir, start, stop, total=6, **options):
  with MetricsLog(workdir, total, start=start, **options) as log:
    for step in range(start, stop):
      log.push(step, {"loss": jnp.float32(loss(step)), "grad_norm": jnp.float32(1)})
      if step % 2:
        log.write(step, {"loss": 2.0})
  return log


def test_every_step_is_written_in_full(tmp_path):
  run(tmp_path, 0, 6, tensorboard=False)
  train = lines(tmp_path)
  assert [r["step"] for r in train] == list(range(6))
  assert [np.float32(r["loss"]) for r in train] == [loss(s) for s in range(6)]
  assert train[2]["bits_per_byte"] == pytest.approx(1 / math.log(2), rel=1e-6)
  assert [r["step"] for r in lines(tmp_path, "eval")] == [1, 3, 5]
  (event,) = lines(tmp_path, "event")
  assert event["event"] == "first_step" and event["seconds"] > 0


def test_metrics_are_read_one_step_late(tmp_path):
  log = MetricsLog(tmp_path, 3, tensorboard=False)
  log.push(0, {"loss": jnp.float32(1)})
  assert lines(tmp_path) == []
  log.push(1, {"loss": jnp.float32(2)})
  assert [r["step"] for r in lines(tmp_path)] == [0] and log.last["loss"] == 1
  log.flush()
  assert [r["step"] for r in lines(tmp_path)] == [0, 1] and log.last["loss"] == 2
  log.close()


def test_every(tmp_path):
  run(tmp_path, 0, 6, every=3, tokens_per_step=10, tensorboard=False)
  assert [r["step"] for r in lines(tmp_path)] == [2, 5]
  assert all(r["tokens_per_second"] > 0 for r in lines(tmp_path))


def test_the_last_step_is_always_written(tmp_path):
  run(tmp_path, 0, 6, every=4, tensorboard=False)
  assert [r["step"] for r in lines(tmp_path)] == [3, 5]


def test_a_resumed_run_leaves_one_continuous_record(tmp_path):
  run(tmp_path, 0, 5, tensorboard=False)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "kind": "tr')  # killed in the middle of a line
  run(tmp_path, 3, 6, tensorboard=False)
  run(tmp_path / "whole", 0, 6, tensorboard=False)
  assert lines(tmp_path) == lines(tmp_path / "whole")
  assert lines(tmp_path, "eval") == lines(tmp_path / "whole", "eval")
  assert [r["step"] for r in lines(tmp_path, "event")] == [0, 3]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "auxiliary_grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stops_the_run(tmp_path, name, value):
  log = MetricsLog(tmp_path, 9, last_checkpoint=lambda: 4, tensorboard=False)
  log.push(6, {"loss": jnp.float32(1), name: jnp.float32(value)})
  with pytest.raises(FloatingPointError, match=f"step 6: {name}.*checkpoint: step 4"):
    log.push(7, {"loss": jnp.float32(1)})
  log.close()
  assert lines(tmp_path)[0][name] is None  # JSON has no such number
  log = MetricsLog(tmp_path, 9, tensorboard=False)
  log.push(0, {name: jnp.float32(value)})
  with pytest.raises(FloatingPointError, match="no checkpoint yet"):
    log.flush()
  log.close()


def test_other_metrics_may_be_anything(tmp_path):
  with MetricsLog(tmp_path, 1, bytes_per_token=None, tensorboard=False) as log:
    log.push(0, {"loss": jnp.float32(1), "perplexity": jnp.float32(math.inf)})
  (line,) = lines(tmp_path)
  assert line["perplexity"] is None and "bits_per_byte" not in line


def test_an_error_in_the_loop_is_not_hidden(tmp_path):
  with (
    pytest.raises(KeyError, match="mine"),
    MetricsLog(tmp_path, 2, tensorboard=False) as log,
  ):
    log.push(0, {"loss": jnp.float32(math.nan)})
    raise KeyError("mine")


def test_tensorboard_files(tmp_path):
  run(tmp_path, 0, 4)
  (file,) = (tmp_path / "tensorboard").iterdir()
  data = file.read_bytes()
  assert b"train/loss" in data and b"eval/bits_per_byte" in data


def test_plain_progress_says_what_matters(tmp_path, capfd):
  run(tmp_path, 0, 6, tokens_per_step=100, tensorboard=False)
  err = capfd.readouterr().err
  assert "step 6/6  0.9017 bits/byte" in err and "tokens/s" in err
  assert "step 2 eval: loss 2, bits_per_byte 2.88539" in err


def test_compilations_are_counted_by_name():
  @jax.jit
  def doubled_once(x):
    return x * 2

  one, two = np.zeros(3, np.float32), np.zeros(4, np.float32)
  with CompileCounter() as counter:
    doubled_once(one)
    doubled_once(one + 1)
    assert counter.counts["doubled_once"] == 1, counter.counts
    doubled_once(two)
  assert counter.counts["doubled_once"] == 2
  assert counter.number >= 2 and counter.seconds > 0
  doubled_once(np.zeros(5, np.float32))
  assert counter.counts["doubled_once"] == 2  # closed


def test_lines_are_json_for_any_reader(tmp_path):
  run(tmp_path, 0, 2, tensorboard=False)
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
