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


def test_write_then_read(tmp_path):
  assert read_config(tmp_path) is None
  write_config(tmp_path / "new", CONFIG)
  stored = read_config(tmp_path / "new")
  assert stored == {**CONFIG, "model": {**CONFIG["model"], "pattern": ["grc", "xl"]}}
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_the_same_config_passes(tmp_path):
  assert check_config(tmp_path, CONFIG) == {}  # a new run
  write_config(tmp_path, CONFIG)
  assert check_config(tmp_path, CONFIG) == {}


def test_changes_are_listed_and_refused(tmp_path):
  write_config(tmp_path, CONFIG)
  model = {"layers": 4, "pattern": ("grc",), "extra": {"a": None}}
  with pytest.raises(ValueError) as error:
    check_config(tmp_path, {**CONFIG, "model": model, "steps": 200})
  text = str(error.value)
  assert "model.layers: stored 2, given 4" in text
  assert "model.pattern: stored ['grc', 'xl'], given ['grc']" in text
  assert "model.extra.a: stored '(absent)', given None" in text
  assert "\n  steps" not in text and "--workdir" in text


def test_some_keys_may_change(tmp_path):
  write_config(tmp_path, CONFIG)
  new = {**CONFIG, "steps": 200, "mesh": {"data": 4}, "save": {"every": 5, "keep": 2}}
  assert check_config(tmp_path, new) == {
    "steps": (100, 200),
    "mesh.data": (-1, 4),
    "save.every": (10, 5),
  }
  with pytest.raises(ValueError, match="steps: stored 100, given 200"):
    check_config(tmp_path, new, ignore=("mesh", "save"))


def test_broken_file(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    check_config(tmp_path, CONFIG)


def test_no_json(tmp_path):
  with pytest.raises(TypeError):
    write_config(tmp_path, {"dtype": object()})
  assert not (tmp_path / "config.json").exists()
