"""Checkpoints: exact, on any mesh, verified, and never the end of a run."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cached_tx.train.checkpoint import Checkpoints, DamagedCheckpoint

# A read that Orbax abandoned may end after the restore has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore:(?s)Exception ignored.*Event loop is closed"
  ":pytest.PytestUnraisableExceptionWarning"
)

DTYPES = [
  "float32",
  "bfloat16",
  "float16",
  "float8_e4m3fn",
  "bool",
  "uint32",
  "int32",
  "uint8",
  "int16",
  "complex64",
]


class Carry(NamedTuple):
  cache: Any
  filled: Any


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  memory: Any
  rng: Any


def mesh(data, model):
  devices = jax.devices()[: data * model]
  return jax.make_mesh(
    (data, model),
    ("data", "model"),
    devices=devices,
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def make_state(grid, seed=0):
  def put(x, *spec):
    return jax.device_put(x, NamedSharding(grid, PartitionSpec(*spec)))

  numbers = np.random.default_rng(seed)
  values = {
    name: put(jnp.asarray(numbers.integers(0, 2, (8, 3)), name), "data")
    for name in DTYPES
  }
  bits = numbers.bytes(4 * 256 * 64)  # incompressible: a large file of its own
  kernel = put(np.frombuffer(bits, np.float32).reshape(256, 64), "data", "model")
  return State(
    step=put(jnp.int32(seed)),
    params={"layers": {"kernel": kernel, "bias": put(jnp.zeros((16,)), "model")}},
    opt_state=((), None, Carry(values, put(jnp.zeros((4, 0, 3)), "data"))),
    memory={
      "empty": {},
      "keys": put(jax.random.split(jax.random.key(seed), 8)),
      "none": put(jnp.zeros((0,), bool)),
    },
    rng=put(jax.random.key(seed, impl="rbg")),
  )


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.sharding == b.sharding
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    chex.assert_trees_all_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def grid():
  return mesh(4, 2)


@pytest.fixture
def saved(tmp_path, grid):
  """A workdir with checkpoints of steps 1 and 2."""
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(grid, step), {"position": step})
  return tmp_path


def restore(workdir, target):
  with Checkpoints(workdir, keep=3) as checkpoints:
    return checkpoints.restore_latest(target)


def array_files(workdir, step):
  """The array data files of a step, the largest last."""
  state = workdir / "checkpoints" / str(step) / "state"
  files = [f for f in state.glob("ocdbt.process_*/d/*") if f.is_file()]
  return sorted(files, key=lambda f: f.stat().st_size)


def test_nothing_to_restore(tmp_path, grid):
  assert restore(tmp_path, abstract(make_state(grid))) is None


def test_every_dtype_comes_back_exactly(saved, grid):
  state, meta = restore(saved, abstract(make_state(grid)))
  assert_same(state, make_state(grid, 2))
  assert meta == {"position": 2}


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (1, 8)])
def test_another_mesh(saved, shape):
  want = make_state(mesh(*shape), 2)
  if shape == (1, 8):  # and other specs
    want = jax.device_put(want, NamedSharding(mesh(*shape), PartitionSpec()))
  state, _ = restore(saved, abstract(want))
  assert_same(state, want)


def test_params_alone(saved):
  want = make_state(mesh(2, 1), 2).params
  with Checkpoints(saved, read_only=True) as checkpoints:
    params, meta = checkpoints.restore_params(abstract(want))
    assert_same(params, want)
    assert meta == {"position": 2}
    params, _ = checkpoints.restore_params(abstract(want), step=1)
    assert_same(params, make_state(mesh(2, 1), 1).params)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7.*\[1, 2\]"):
      checkpoints.restore_params(abstract(want), step=7)
    with pytest.raises(ValueError, match="read_only"):
      checkpoints.save(3, {"params": want}, {})


def test_the_state_may_be_donated_at_once(tmp_path, grid):
  state = jax.device_put(
    {"w": jnp.arange(2**18, dtype=jnp.float32)}, NamedSharding(grid, PartitionSpec())
  )
  spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    target = abstract(state)
    checkpoints.save(1, state, {})
    spoil(state)
    (got, _) = checkpoints.restore_latest(target)
  np.testing.assert_array_equal(got["w"], np.arange(2**18, dtype=np.float32))


@pytest.mark.parametrize(
  "losses,best,kept",
  [
    ([3, 2, 1, 4, 5, 6], 3, [3, 5, 6]),
    ([1, 2, 3, 4, 5, 6], 1, [1, 5, 6]),
    ([6, 5, 4, 3, 2, 1], 6, [5, 6]),
    ([3, None, float("nan"), 4, None, None], 1, [1, 5, 6]),
    ([None] * 6, None, [5, 6]),
  ],
)
def test_keeps_the_newest_and_the_best(tmp_path, losses, best, kept):
  state = {"w": jnp.zeros(3)}
  for first in (0, 3):  # the second half after a restart
    with Checkpoints(tmp_path, keep=2) as checkpoints:
      for step, loss in list(enumerate(losses, 1))[first : first + 3]:
        metrics = None if loss is None else {"loss": float(loss)}
        assert checkpoints.save(step, state, {}, metrics)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == kept
    assert checkpoints.best_step() == best


def test_losses_of_different_texts_are_not_compared(tmp_path):
  state = {"w": jnp.zeros(3)}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    for step, (text, loss) in enumerate([("a", 1.0), ("b", 3.0), ("b", 2.0)], 1):
      checkpoints.save(step, state, {"scored_on": text}, {"loss": loss})
      assert checkpoints.best_step() == step
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.best_step() == 3 and checkpoints.steps() == [3]


def test_a_saved_step_is_not_saved_again(saved, grid):
  with Checkpoints(saved) as checkpoints:
    assert not checkpoints.save(2, make_state(grid, 5), {})
    assert checkpoints.latest_step() == 2


def test_due(tmp_path):
  with Checkpoints(tmp_path, every=5) as checkpoints:
    assert [s for s in range(1, 12) if checkpoints.due(s)] == [5, 10]
  with Checkpoints(tmp_path, every=0) as checkpoints:
    assert not any(checkpoints.due(s) for s in range(1, 12))


def flip(workdir):
  path = array_files(workdir, 2)[-1]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(workdir):
  path = array_files(workdir, 2)[-1]
  path.write_bytes(path.read_bytes()[:100])


def delete(workdir):
  for path in array_files(workdir, 2):
    path.unlink()


def edit_meta(workdir):
  path = workdir / "checkpoints/2/meta/metadata"
  path.write_text(path.read_text().replace('"position": 2', '"position": 3'))


def cut_meta(workdir):
  path = workdir / "checkpoints/2/meta/metadata"
  path.write_text(path.read_text()[:50])


def remove_item(item):
  def damage(workdir):
    (workdir / "checkpoints/2" / item).rename(workdir / "elsewhere")

  return damage


def empty_step(workdir):
  (workdir / "checkpoints/2").rename(workdir / "elsewhere")
  (workdir / "checkpoints/2").mkdir()


DAMAGE = {
  "flipped byte": (flip, "fingerprint differs in params/layers/kernel"),
  "truncated array": (truncate, "reading the array params/layers/kernel"),
  "deleted arrays": (delete, "reading the array "),
  "edited meta": (edit_meta, "sha256"),
  "truncated meta": (cut_meta, "JSON"),
  "no meta": (remove_item("meta"), "meta"),
  "no state": (remove_item("state"), "state"),
  "empty step": (empty_step, ""),
}


@pytest.mark.parametrize("damage,what", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_walked_back(saved, grid, caplog, damage, what):
  damage(saved)
  with Checkpoints(saved, keep=3) as checkpoints:
    with caplog.at_level(logging.WARNING, logger="cached_tx"):
      state, meta = checkpoints.restore_latest(abstract(make_state(grid)))
    assert_same(state, make_state(grid, 1))
    assert meta == {"position": 1}
    assert "checkpoint of step 2" in caplog.text and what in caplog.text
    assert (saved / "checkpoints/2.damaged").is_dir()  # kept for whoever looks
    assert checkpoints.save(2, make_state(grid, 2), {"position": 2})
  state, meta = restore(saved, abstract(make_state(grid)))
  assert_same(state, make_state(grid, 2))


def test_all_damaged_is_an_error_and_moves_nothing(saved, grid):
  flip(saved)
  remove_item("meta")(saved)
  (saved / "checkpoints/1/meta/metadata").write_text("{")
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=r"(?s)no checkpoint.*step 2.*step 1"):
      checkpoints.restore_latest(abstract(make_state(grid)))
    assert checkpoints.steps() == [1, 2]


def test_damaged_params_of_a_given_step(saved):
  flip(saved)
  target = abstract(make_state(mesh(2, 1)).params)
  with Checkpoints(saved, read_only=True) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=r"step 2.*params/layers/kernel"):
      checkpoints.restore_params(target, step=2)
    _, meta = checkpoints.restore_params(target)
    assert meta == {"position": 1}
    assert checkpoints.steps() == [1, 2]


def test_another_state_is_no_damage(saved, grid):
  state = make_state(grid)
  wrong = state.replace(params={"layers": {"kernel": state.params["layers"]["bias"]}})
  with Checkpoints(saved) as checkpoints:
    with pytest.raises(
      ValueError,
      match=(
        r"(?s)params/layers/bias: stored float32\[16\], wanted nothing.*"
        r"params/layers/kernel: stored float32\[256, 64\], wanted float32\[16\]"
      ),
    ):
      checkpoints.restore_latest(abstract(wrong))
    assert checkpoints.steps() == [1, 2]
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with pytest.raises(ValueError, match="no sharding"):
      checkpoints.restore_latest(bare)


def test_arguments(tmp_path):
  with pytest.raises(ValueError, match=r"save\.keep is 0"):
    Checkpoints(tmp_path, keep=0)
  with pytest.raises(ValueError, match=r"save\.every is -1"):
    Checkpoints(tmp_path, every=-1)
  with pytest.raises(ValueError, match="is a URL"):
    Checkpoints("gs://bucket/run")
  checkpoints = Checkpoints(tmp_path)
  with checkpoints, pytest.raises(ValueError, match="'step' is a int"):
    checkpoints.save(1, {"step": 1}, {})


KILLED = """
import jax.numpy as jnp, sys
from cached_tx.train.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"w": jnp.arange(2**23, dtype=jnp.float32)}
checkpoints.save(1, state, {})
checkpoints.wait()
checkpoints.save(2, state, {})
print("saving", flush=True)
checkpoints.wait()
print("done", flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  child = subprocess.Popen(
    [sys.executable, "-c", KILLED, str(tmp_path)],
    stdout=subprocess.PIPE,
    env=env,
    stderr=subprocess.DEVNULL,
  )
  folder = tmp_path / "checkpoints"
  while child.poll() is None and not list(folder.glob("2.*tmp*")):
    time.sleep(0.001)
  child.send_signal(signal.SIGKILL)
  out, _ = child.communicate()
  assert b"done" not in out and list(folder.glob("2.*tmp*")), "killed too late"
  state = {"w": jnp.arange(2**23, dtype=jnp.float32)}
  with Checkpoints(tmp_path) as checkpoints:
    got, _ = checkpoints.restore_latest(abstract(state))
    chex.assert_trees_all_equal(got, state)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state, {})
  assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
  json.loads((folder / "2/meta/metadata").read_text())
