"""A trained model is read back, on one device, in a few lines."""

import re
import runpy
import shutil
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.data.tokenizers import Bytes
from cached_tx.load import load
from cached_tx.train.checkpoint import Checkpoints
from cached_tx.train.experiment import Experiment
from cached_tx.types import Segment
from tests.trained import workdir


def test_a_run_on_eight_devices_is_read_on_one():
  experiment = Experiment.of(workdir())
  assert experiment.mesh.size == 8
  want, _ = experiment.restore_params(workdir())
  own = load(workdir(), batch=3)
  for leaf in jax.tree.leaves(own.params):
    assert leaf.devices() == {jax.devices()[0]}
  chex.assert_trees_all_equal(jax.device_get(own.params), jax.device_get(want))
  assert own.step == 4 and own.config == experiment.config
  assert {leaf.shape[1] for leaf in jax.tree.leaves(own.state)} == {3}


def test_an_older_step():
  own, newest = load(workdir(), step=2), load(workdir())
  assert own.step == 2
  same = jax.tree.map(np.array_equal, own.params, newest.params)
  assert not all(jax.tree.leaves(same))


def test_any_cut_of_the_text_gives_the_model_s_own_logits():
  own = load(workdir())
  ids = own.ids(b"In the beginning")[:, :16]
  assert ids[0, 0] == own.tokenizer.bos
  tokens, start = jnp.asarray(ids), own.model.initial_state(1)
  segment = Segment(tokens == own.tokenizer.bos)
  want, _, _ = own.model.apply({"params": own.params}, tokens, start, segment)
  first, state = own(ids[:, :5], own.state)
  second, _ = own(ids[:, 5:], state)
  got = np.concatenate([first, second], axis=1)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_lines_of_the_docstring_run(monkeypatch, tmp_path):
  shutil.copytree(workdir(), tmp_path / "runs" / "quickstart")
  monkeypatch.chdir(tmp_path)
  [block] = re.findall(r"In a notebook:\n\n((?: {6}.*\n)+)", load.__doc__)
  notebook = tmp_path / "notebook.py"
  notebook.write_text(textwrap.dedent(block))
  names = runpy.run_path(str(notebook))
  assert names["logits"].shape == (1, 12, 257)  # of the second call


def test_a_state_is_bound_to_the_model_that_made_it(tmp_path):
  own = load(workdir())
  _, state = own(own.ids(b"In the beginning"), own.state)
  own.save_state(tmp_path / "state", state, {"read": 17})
  back, meta = load(workdir()).load_state(tmp_path / "state")
  chex.assert_trees_all_equal(back, state)
  assert meta == {"read": 17}
  with pytest.raises(ValueError, match="belongs to a model of other weights"):
    load(workdir(), step=2).load_state(tmp_path / "state")
  other = own.config.copy_and_resolve_references().unlock()
  other.memory.size, other.log_every = 4, 99
  with pytest.raises(ValueError, match=r"memory\.size: saved with 8, given 4") as found:
    own._replace(config=other).load_state(tmp_path / "state")
  assert "log_every" not in str(found.value)  # it changes nothing that was computed
  with pytest.raises(ValueError, match="another number of rows"):
    load(workdir(), batch=2).load_state(tmp_path / "state")


def test_what_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    load(tmp_path)
  with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
    load(workdir(), step=3)
  with pytest.raises(ValueError, match="batch is 0"):
    load(workdir(), batch=0)
  shutil.copy(workdir() / "config.json", tmp_path)
  with pytest.raises((ValueError, FileNotFoundError)):
    load(tmp_path)


def test_another_vocabulary_of_the_same_size_is_refused(monkeypatch):
  monkeypatch.setattr(Bytes, "identity", "words-0123")
  with pytest.raises(ValueError, match=r"those of bytes, but .* give words-0123"):
    load(workdir())


def test_loading_changes_nothing_in_the_folder():
  before = sorted(workdir().rglob("*"))
  load(workdir())
  assert sorted(workdir().rglob("*")) == before
  with Checkpoints(workdir(), read_only=True) as checkpoints:
    assert checkpoints.steps() == [2, 4]
