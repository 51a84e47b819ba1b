"""A state in a file: the same to the last bit, or refused with the reason."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from cached_tx.generate import Reached, generate
from cached_tx.layers import Stream
from cached_tx.memory import load_state, save_state
from cached_tx.memory import saved as module
from tests.kinds import SOME, V, decoder, parallel, streamed, text, toy

BOS = V - 1
CONFIG = {"memory.kind": "a", "model.width": 16}


def written(path, kind="xl", **options):
  """A stream in the midst of a segment, and the arguments that read it."""
  own, (tokens, starts) = toy(kind), text(0)
  _, state, _ = streamed(own, tokens, starts, [3, 3])
  bound = {"params": own.params, "config": CONFIG}
  save_state(path, state, **bound, **options)
  return state, bound


def like(kind="xl", rows=2):
  model = toy(kind).model
  return model.open_stream(model.initial_state(rows), rows)


@SOME
def test_a_generation_goes_on_to_the_last_bit(kind, tmp_path):
  own, prompt = toy(kind), [BOS, 3, 1]
  options = {"bos": BOS, "seed": 7}
  whole = generate(own.model, own.params, prompt, length=9, **options)
  want = list(whole)
  first = generate(own.model, own.params, prompt, length=4, **options)
  got = list(first)
  state, drawn = first.reached.state, first.reached.drawn
  bound = {"params": own.params, "config": CONFIG}
  meta = {"last": first.reached.last.tolist(), "drawn": drawn}
  save_state(tmp_path / "state", state, **bound, meta=meta)
  state, meta = load_state(tmp_path / "state", like(kind, 1), **bound)
  after = Reached(state, np.array(meta["last"], np.int32), meta["drawn"])
  second = generate(own.model, own.params, [], length=5, after=after, **options)
  got += list(second)
  assert got == want
  assert second.reached.drawn == 9 and second.reached.last.tolist() == want[-1:]
  chex.assert_trees_all_equal(second.reached.state, whole.reached.state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_type_comes_back(dtype, tmp_path):
  with jax.enable_x64(dtype == "float64"):
    model = decoder("compressive-conv", dtype)
    state = model.open_stream(model.initial_state(2), 2)
    rng = np.random.default_rng(0)
    fill = lambda a: jnp.asarray(rng.normal(size=a.shape) * 3, a.dtype)
    state = jax.tree.map(fill, state)
    bound = {"params": {"w": jnp.ones(3, dtype)}, "config": {}}
    save_state(tmp_path / "state", state, **bound)
    back, meta = load_state(tmp_path / "state", jax.eval_shape(lambda: state), **bound)
    assert {str(a.dtype) for a in jax.tree.leaves(state)} == {dtype, "bool", "int32"}
    assert not meta
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_dtypes(back, state)


def test_boundary_states_and_arrays_of_nothing(tmp_path):
  own, (tokens, starts) = toy("compressive-mean"), text(0)
  _, state, _ = parallel(own, tokens, starts)
  state = (state[0], {"none": None, "list": [jnp.zeros((0, 3)), jnp.int32(4)]})
  bound = {"params": own.params, "config": CONFIG}
  save_state(tmp_path / "state", state, **bound, meta={"read": 12})
  back, meta = load_state(tmp_path / "state", state, **bound)
  assert meta == {"read": 12}
  chex.assert_trees_all_equal(back, state)


def test_arrays_come_back_where_the_target_lies(tmp_path):
  state, bound = written(tmp_path / "state")
  target = jax.device_put(like(), jax.devices()[3])
  back, _ = load_state(tmp_path / "state", target, **bound)
  assert {d for a in jax.tree.leaves(back) for d in a.devices()} == {jax.devices()[3]}
  chex.assert_trees_all_equal(jax.device_get(back), jax.device_get(state))


def test_the_file_is_safetensors(tmp_path):
  state, _ = written(tmp_path / "state")
  with safetensors.safe_open(tmp_path / "state", "np") as file:
    np.testing.assert_array_equal(file.get_tensor("0/phase"), state[0].phase)
    header = json.loads(file.metadata()["cached_tx"])
  assert header["format"] == 1
  assert header["leaves"]["0/tokens"]["shape"] == [2, 2, 4, 16]
  assert list(header["tree"][0]["Stream"]) == list(Stream._fields)


def refused(path, bound, target=None):
  with pytest.raises(ValueError) as caught:
    load_state(path, like() if target is None else target, **bound)
  assert str(caught.value).startswith(str(path))
  return str(caught.value)


def test_a_flipped_byte_anywhere_is_refused(tmp_path):
  """Every byte of the header in turn would take long: every 7th, another bit each."""
  path = tmp_path / "state"
  _, bound = written(path)
  whole = path.read_bytes()
  size = 8 + int.from_bytes(whole[:8], "little")
  for at in [*range(8), *range(8, size, 7), *range(size, len(whole), 501)]:
    data = bytearray(whole)
    data[at] ^= 1 << at % 8
    path.write_bytes(data)
    said = refused(path, bound)
    assert at < size or ("the array" in said and "changed since" in said), (at, said)
  path.write_bytes(whole)
  load_state(path, like(), **bound)


def test_the_array_with_the_flipped_byte_is_named(tmp_path):
  path = tmp_path / "state"
  _, bound = written(path)
  data = bytearray(path.read_bytes())
  size = int.from_bytes(data[:8], "little")
  header = json.loads(bytes(data[8 : 8 + size]))
  for name in ("0/phase", "0/memory/recent/tokens"):
    _, end = header[name]["data_offsets"]
    broken = bytearray(data)
    broken[8 + size + end - 1] ^= 0x80
    path.write_bytes(broken)
    assert f"the array {name} changed" in refused(path, bound)


@pytest.mark.parametrize("length", [0, 5, 8, 200, -1, -900])
def test_a_file_that_is_cut_off(length, tmp_path):
  path = tmp_path / "state"
  _, bound = written(path)
  path.write_bytes(path.read_bytes()[:length])
  assert "cut off" in refused(path, bound)


def test_more_at_the_end_and_other_files(tmp_path):
  path = tmp_path / "state"
  _, bound = written(path)
  path.write_bytes(path.read_bytes() + b"\0")
  assert "changed since" in refused(path, bound)
  path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
  assert "is no state of this package" in refused(path, bound)
  with pytest.raises(FileNotFoundError):
    load_state(tmp_path / "nothing", like(), **bound)


def test_a_later_format(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "FORMAT", 2)
  _, bound = written(tmp_path / "state")
  monkeypatch.undo()
  assert "has format 2, but this version reads 1" in refused(tmp_path / "state", bound)


def test_other_weights_are_named(tmp_path):
  _, bound = written(tmp_path / "state")
  params = jax.tree.map(np.array, bound["params"])
  params["embedding"][3, 5] = np.nextafter(params["embedding"][3, 5], np.float32(9))
  said = refused(tmp_path / "state", bound | {"params": params})
  assert "other weights: embedding of" in said
  del params["embedding"]
  assert "embedding of" in refused(tmp_path / "state", bound | {"params": params})
  params = jax.tree.map(lambda a: a + 1, bound["params"])
  assert "and" in refused(tmp_path / "state", bound | {"params": params})


def test_another_config_is_named(tmp_path):
  _, bound = written(tmp_path / "state")
  said = refused(tmp_path / "state", bound | {"config": CONFIG | {"model.width": 32}})
  assert "model.width: saved with 16, given 32" in said and "memory.kind" not in said
  said = refused(tmp_path / "state", bound | {"config": {"memory.kind": "a"}})
  assert "model.width: saved with 16, given '(absent)'" in said


def test_another_structure_is_named(tmp_path):
  path = tmp_path / "state"
  _, bound = written(path)
  boundary = toy("xl").model.initial_state(2)
  assert "another structure" in refused(path, bound, boundary)
  assert "another structure" in refused(path, bound, like("grc"))
  assert "at 0/memory/recent/tokens" in refused(path, bound, like(rows=3))
  wide = jax.tree.map(lambda a: a.astype(jnp.float16), like())
  assert "float16 of shape" in refused(path, bound, wide)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "state"
  written(path)
  old = path.read_bytes()
  monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("full")))
  with pytest.raises(OSError, match="full"):
    written(path, "favor")
  assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
