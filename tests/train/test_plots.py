"""Pictures: a PNG of the right size that shows what the log holds."""

import json
import struct

import numpy as np
import pytest

from cached_tx.train.plots import (
  attention_plot,
  gauge_plot,
  loss_plot,
  recall_plot,
  smoothed,
)


def write(path, train=200, evaluations=4):
  noise = np.random.default_rng(0).normal(size=train)
  values = 2 + 6 * np.exp(-np.arange(train) / 30) + 0.08 * noise
  records = [
    {"step": s, "kind": "train", "bits_per_byte": v} for s, v in enumerate(values)
  ]
  for step in np.linspace(train // 10, train - 1, evaluations).astype(int):
    records.append({"step": int(step), "kind": "eval", "bits_per_byte": values[step]})
  records.append({"step": 0, "kind": "event", "event": "first_step", "seconds": 1})
  path.write_text("".join(json.dumps(r) + "\n" for r in records))


def size(path):
  data = path.read_bytes()
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  return struct.unpack(">II", data[16:24]), len(data)


@pytest.mark.parametrize("counts", [(200, 4), (200, 0), (1, 1)])
def test_loss_plot(tmp_path, counts):
  write(tmp_path / "metrics.jsonl", *counts)
  path = loss_plot(
    tmp_path / "metrics.jsonl",
    tmp_path / "plots" / "loss.png",
    references={"gzip -9": 2.55, "bz2 -9": 2.2},
    title="Compressive memory, World English Bible",
  )
  pixels, length = size(path)
  assert pixels == (1600, 1000) and length > 20_000


def test_the_lines_are_in_the_picture(tmp_path):
  write(tmp_path / "metrics.jsonl")
  bare = loss_plot(tmp_path / "metrics.jsonl", tmp_path / "a.png").read_bytes()
  same = loss_plot(tmp_path / "metrics.jsonl", tmp_path / "b.png").read_bytes()
  lined = loss_plot(
    tmp_path / "metrics.jsonl", tmp_path / "c.png", references={"xz": 3.0}
  ).read_bytes()
  assert bare == same != lined


def test_nothing_to_draw(tmp_path):
  write(tmp_path / "metrics.jsonl")
  with pytest.raises(ValueError, match="no line with 'accuracy'"):
    loss_plot(tmp_path / "metrics.jsonl", tmp_path / "a.png", metric="accuracy")


def test_gauge_plot(tmp_path):
  gauges = {f"gate/{n}/{h}": 0.1 * n + 0.02 * h for n in range(6) for h in range(4)}
  more = gauges | {"step": 7, "kind": "gauge", "other/0/0": 3.0}
  path = gauge_plot(gauges, tmp_path / "plots" / "gates.png", name="gate")
  pixels, length = size(path)
  assert pixels == (1600, 1000) and length > 10_000
  same = gauge_plot(more, tmp_path / "a.png", name="gate").read_bytes()
  assert same == path.read_bytes()
  moved = gauge_plot(gauges | {"gate/3/1": 0.9}, tmp_path / "b.png", name="gate")
  assert moved.read_bytes() != same
  with pytest.raises(ValueError, match=r"no gauge 'share'"):
    gauge_plot(gauges, tmp_path / "c.png", name="share")


def test_smoothed():
  line = np.arange(400.0)
  np.testing.assert_allclose(smoothed(line)[:-4], line[:-4])  # no lag
  spike = np.eye(1, 400, 200)[0]
  np.testing.assert_allclose(smoothed(spike)[196:205].max(), 1 / 9)
  np.testing.assert_allclose(smoothed(spike)[[195, 205]], 0, atol=1e-12)


@pytest.mark.parametrize("losses", [True, False])
def test_attention_plot(tmp_path, losses):
  bucket = {"keys": 8, "mass": 1 / 18, "error": 0.01}
  names = ("compressed", "memory", "sequence")
  parts = [{"region": r, "part": p, **bucket} for r in names for p in range(1, 7)]
  parts[3]["error"] = None
  nothing = {"mean": None, "error": None}
  layers = [
    {"layer": 0, "losses": {"reconstruction": {"mean": 0.3, "error": 0.1}}},
    {"layer": 1, "losses": {"reconstruction": nothing}},
    {"layer": 2},
  ]
  found = {
    "groups": [{"memory": "compressive", "layers": [0, 1], "buckets": parts}],
    "layers": layers if losses else [{"layer": 0}],
  }
  path = attention_plot(found, tmp_path / "plots" / "attention.png", title="a")
  pixels, length = size(path)
  assert pixels == (1600, 800 * (1 + losses)) and length > 10_000


@pytest.mark.parametrize("tasks,pixels", [(1, (1200, 700)), (3, (1600, 1400))])
def test_recall_plot(tmp_path, tasks, pixels):
  runs = [
    {"task": f"t{i % tasks}", "kind": kind, "accuracy": [1.0, 0.9 - 0.2 * i, 0.1]}
    for i in range(2 * tasks)
    for kind in ("xl", "favor")
  ]
  runs.pop()  # a kind that one task lacks a seed of
  found = {"runs": runs, "chance": 0.1, "segment": 16, "longest": 2}
  path = recall_plot(found, tmp_path / "plots" / "recall.png")
  (width, height), length = size(path)
  assert (width, height) == pixels and length > 10_000
