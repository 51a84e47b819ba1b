"""config.json: a workdir goes on with the config it began with."""

import pytest

from cached_tx.train.run_config import check_config, read_config, write_config

CONFIG = {
  "seed": 0,
  "steps": 100,
  "log_every": 1,
  "model": {"layers": 2, "pattern": ("grc", "xl"), "extra": {}},
  "mesh": {"data": -1},
  "save": {"every": 10, "keep": 2},
}


@pytest.fixture
def begun(tmp_path):
  """A workdir with a checkpoint."""
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  return tmp_path


def test_nothing_is_pinned_before_the_first_checkpoint(tmp_path):
  write_config(tmp_path, CONFIG)
  (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)  # killed
  assert check_config(tmp_path, {**CONFIG, "seed": 1}) == {}
  (tmp_path / "config.json").write_text("{")
  assert check_config(tmp_path, CONFIG) == {}


def test_write_then_read(tmp_path):
  assert read_config(tmp_path) is None
  write_config(tmp_path / "new", CONFIG)
  stored = read_config(tmp_path / "new")
  assert stored == {**CONFIG, "model": {**CONFIG["model"], "pattern": ["grc", "xl"]}}
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_the_same_config_passes(begun):
  assert check_config(begun, CONFIG) == {}  # a new run
  write_config(begun, CONFIG)
  assert check_config(begun, CONFIG) == {}


def test_changes_are_listed_and_refused(begun):
  write_config(begun, CONFIG)
  model = {"layers": 4, "pattern": ("grc",), "extra": {"a": None}}
  with pytest.raises(ValueError) as error:
    check_config(begun, {**CONFIG, "model": model, "log_every": 2})
  text = str(error.value)
  assert "model.layers: stored 2, given 4" in text
  assert "model.pattern: stored ['grc', 'xl'], given ['grc']" in text
  assert "model.extra.a: stored '(absent)', given None" in text
  assert "\n  log_every" not in text and "--workdir" in text


def test_some_keys_may_change(begun):
  write_config(begun, CONFIG)
  new = {**CONFIG, "log_every": 2, "mesh": {"data": 4}, "save": {"every": 5, "keep": 2}}
  assert check_config(begun, new) == {
    "log_every": (1, 2),
    "mesh.data": (-1, 4),
    "save.every": (10, 5),
  }
  with pytest.raises(ValueError, match="log_every: stored 1, given 2"):
    check_config(begun, new, ignore=("mesh", "save"))


def test_broken_file(begun):
  (begun / "config.json").write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    check_config(begun, CONFIG)


def test_no_json(tmp_path):
  with pytest.raises(TypeError):
    write_config(tmp_path, {"dtype": object()})
  assert not (tmp_path / "config.json").exists()
