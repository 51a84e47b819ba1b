"""The Long Range Arena's benchmark: what it times, on small pieces."""

import json
import sys

import numpy as np
import pytest

from benchmarks import lra, lra_results
from cached_tx.lra import table


def test_a_longer_row_needs_more_memory():
  few, many = (lra.Attention("local", n, 1) for n in (64, 256))
  assert 1.5 * few.peak < many.peak and few.seconds() > 0


def test_records_make_a_table():
  names = ["linear", "local,cached"]
  found = lra.measure(names, 40, 1, 1, "step")
  assert [(r["model"], r["cached"]) for r in found] == [
    ("linear", False),
    ("local", True),
  ]
  assert all(r["steps_per_second"] > 0 and r["peak_bytes"] > 1e6 for r in found)
  base = found[0] | {
    "model": "transformer",
    "steps_per_second": 1.0,
    "peak_bytes": 10**8,
  }
  rows = table.relative([base, *found])
  own = next(row for row in rows if row["model"] == "linear")
  np.testing.assert_allclose(own["speedup"], found[0]["steps_per_second"])


def test_a_layer_beside_a_cache_costs_more():
  """It reads as many slots as the row has tokens."""
  bare, cached = (lra.Attention(name, 64, 1) for name in ("local", "local,cached"))
  assert cached.peak > bare.peak and cached.seconds() > 0


def test_variants_are_other_programs():
  """Scores of all pairs need memory that blocks do not."""
  blocks, dense = (
    lra.Attention(name, 512, 1).peak for name in ("transformer", "transformer-dense")
  )
  assert dense > blocks + 4 * 512**2 * 4


def test_growth_is_the_slope_of_logarithms():
  records = [
    {
      "model": m,
      "cached": False,
      "length": n,
      "steps_per_second": 1e6 / n**p,
      "peak_bytes": n ** (p - 1),
    }
    for m, p in (("local", 1.0), ("transformer", 2.0))
    for n in (1024, 2048, 8192)
  ]
  found = lra.growth(records)
  powers = [found[m][kind] for m in found for kind in ("time", "memory")]
  np.testing.assert_allclose(powers, (1, 0, 2, 1), atol=1e-9)
  table = lra.growth_markdown(found)
  assert "| transformer | 1,049 | 4,194 | 67,109 | L^2.00 | L^1.00 |" in table


def test_a_cached_run_and_a_bare_one_for_every_seed_of_the_plan():
  runs = list(lra_results.planned(["listops", "text_demo"], [0, 1]))
  assert len(runs) == len(set(runs)) == 2 * 2 * 2 * len(lra_results.FIVE)
  assert [run.seed for run in runs] == [0] * 20 + [1] * 20
  assert len({run.name for run in runs}) == len(runs)


def test_runs_are_trained_once_and_recorded(tmp_path, monkeypatch, capsys):
  """By the real command, in small; a second call does nothing."""
  suite = lra_results.Suite("text_demo", "text_demo", ("smoke",), models=("linear",))
  file = tmp_path / "results.jsonl"
  monkeypatch.setattr(lra_results, "SUITES", {"tiny": suite})
  monkeypatch.setattr(lra_results, "FILE", file)
  monkeypatch.setattr(lra_results, "describe", lambda: {"commit": "none"})
  folder, data = tmp_path / "runs", tmp_path / "data"
  argv = ["lra_results", "--runs", str(folder), "--data", str(data), "--jobs", "1"]
  monkeypatch.setattr(sys, "argv", argv)
  lra_results.main()
  records = [json.loads(line) for line in file.read_text().splitlines()]
  assert [(r["run"], r["cached"]) for r in records] == [
    ("tiny/linear/0", False),
    ("tiny/linear-cached/0", True),
  ]
  assert all(r["steps"] == 4 and r["commit"] == "none" for r in records)
  assert len(table.summary(table.results(file))) == 2
  assert [r["asked"] for r in records] == [["linear,smoke"], ["linear,cached,smoke"]]
  assert all(r["seconds"] > 0 for r in records)
  before = file.read_text()
  capsys.readouterr()
  lra_results.main()
  assert file.read_text() == before
  assert capsys.readouterr().out.split() == [
    "done", "tiny/linear/0", "done", "tiny/linear-cached/0",
  ]  # fmt: skip
  other = suite._replace(changes=("steps=5",))
  monkeypatch.setattr(lra_results, "SUITES", {"tiny": other})
  assert not any(map(lra_results.recorded, lra_results.planned(["tiny"], [0])))


def test_a_failed_run_names_its_log(tmp_path):
  run = lra_results.Run("listops", "linear", False, 0)
  with pytest.raises(RuntimeError, match=r"listops/linear/0 failed .*log\.txt"):
    lra_results.trained(run, tmp_path, tmp_path / "nothing", 0)
  log = (tmp_path / run.name / "log.txt").read_text()
  assert "cached-tx lra prepare --task listops" in log
