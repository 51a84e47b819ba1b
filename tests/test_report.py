"""What a finished run shows."""

import json
import shutil

import pytest
from matplotlib.image import imread

from cached_tx import report as module
from cached_tx.report import ranking, report, speed
from tests.trained import tiny, workdir


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(workdir(), tmp_path / "run")


def test_a_report(folder, capsys, monkeypatch):
  monkeypatch.setattr(module, "SAMPLE", 20)
  found = report(folder)
  shown = capsys.readouterr().out
  stored = json.loads((folder / "report.json").read_text())
  markdown = (folder / "report.md").read_text()
  assert stored["test"] == found["test"] and stored["step"] == 4
  assert stored["config"]["steps"] == 4
  ranked = ranking(found)
  assert [bits for _, bits in ranked] == sorted(bits for _, bits in ranked)
  assert {"this model", "gzip -9", "5-byte context, counted"} <= {n for n, _ in ranked}
  for name, bits in ranked:
    assert f"{name} " in shown and f"{bits:.3f}" in shown
    assert f"| {name} | {bits:.3f} |" in markdown
  for path in found["files"].values():
    assert path in shown
  assert imread(folder / "loss.png").shape == (1000, 1600, 4)
  assert 0 < len(found["sample"]) <= 20
  assert "0 recompilations" in shown and "tokens/s" in shown


def test_gauges_are_drawn(tmp_path):
  lines = [
    {"step": 3, "kind": "gauge", "gate/0/0": 0.1, "other/0/0": 0.1},
    {"step": 7, "kind": "gauge", "gate/0/0": 0.4, "gate/1/0": 0.6},
    {"step": 7, "kind": "train", "loss": 1.0},
  ]
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = module._gauge_plots(tmp_path)
  assert found == {"plot of gate": tmp_path / "gate.png"}  # of the newest line
  assert imread(tmp_path / "gate.png").shape == (1000, 1600, 4)
  path.write_text(json.dumps(lines[-1]) + "\n")
  assert module._gauge_plots(tmp_path) == {}


def test_large_texts_have_no_baselines(folder, capsys, monkeypatch):
  monkeypatch.setattr(module, "LARGEST", 1000)
  monkeypatch.setattr(module, "SAMPLE", 1)
  found = report(folder)
  assert found["baselines"] is None and "more than" in found["baselines_skipped"]
  assert "no n-grams" in capsys.readouterr().out


def test_scores_are_kept_where_a_sample_cannot_be(folder, capsys, monkeypatch):
  def full(*args, **kwargs):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

  monkeypatch.setattr(module, "write", full)
  found = report(folder)
  assert found["sample"] is None and "RESOURCE_EXHAUSTED" in found["sample_skipped"]
  assert "no sample: one device could not write it" in capsys.readouterr().out
  assert "No sample: one device" in (folder / "report.md").read_text()
  assert json.loads((folder / "report.json").read_text())["test"] == found["test"]


def test_speed(tmp_path):
  lines = [
    {"step": 0, "kind": "event", "event": "first_step", "seconds": 9.0},
    {"step": 0, "kind": "train", "loss": 1.0},
    {"step": 1, "kind": "train", "tokens_per_second": 100.0, "seconds": 2.0},
    {"step": 2, "kind": "train", "tokens_per_second": 128.0, "seconds": 1.0},
    {"step": 2, "kind": "event", "event": "first_step", "seconds": 2.5},
    {"step": 3, "kind": "train", "tokens_per_second": 184.0, "seconds": 1.0},
    {"step": 4, "kind": "event", "event": "end", "recompilations": 0},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  assert speed(tiny(), tmp_path) == {
    "first_step_seconds": 2.5,
    "compile_seconds": None,
    "recompilations": 0,
    "tokens_per_second": 128.0,  # 512 in 4 s, of both starts
    "steps_per_second": 1.0,  # 8 rows, 2 segments of 8 tokens
  }


def test_a_speed_that_was_not_measured_is_no_number(tmp_path):
  line = {"step": 0, "kind": "train", "loss": 1.0}  # the only step, which compiles
  (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  test = {"data": "web_en", "split": "test", "bytes": 9, "documents": 2}
  found = {"parameters": 7, "step": 1, "test": test, "speed": speed(tiny(), tmp_path)}
  assert module._facts(found)[1].endswith(
    "speed not measured: no step after the first was logged"
  )


def test_a_sample_cannot_upset_a_terminal():
  assert module.printable("a\x1b[2J\nb\u00e9") == "a\ufffd[2J\nb\u00e9"
