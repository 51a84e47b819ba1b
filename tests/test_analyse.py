"""Analysis of a checkpoint."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from cached_tx import analyse as module
from cached_tx.analyse import analyse, text
from cached_tx.data import EvaluationBatches, documents, tokenize
from cached_tx.load import load
from cached_tx.train.attended import observe
from tests.trained import workdir


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(workdir(), tmp_path / "run")


@functools.cache
def told(rows, segments):
  """Every segment of every row, observed one after the other: lists of numbers."""
  own = load(workdir())
  tokens = tokenize(documents("web_en", "validation"), own.tokenizer)
  batches = EvaluationBatches(tokens, rows=rows, length=own.model.segment)
  step = jax.jit(lambda *args: observe(own.model, *args))
  state, found = own.model.initial_state(rows), []
  for batch in batches[:segments]:
    one, state = step(own.params, batch.tokens, batch.starts, state)
    found.append(jax.device_get(one[0]))
  join = lambda *leaves: np.concatenate(leaves, axis=-1)
  return jax.tree.map(join, *found)  # the last axis: samples


@pytest.mark.parametrize("full", [False, True])
def test_numbers_are_those_of_the_segments(folder, full):
  found = analyse(folder, split="validation", rows=2, segments=8, full=full)
  found = json.loads(json.dumps(found))
  want = told(2, 8)
  counted = want["full"][0] if full else np.ones(16, bool)
  assert 2 < counted.sum() < 16 or not full
  mass = np.float64(want["mass"][0][:, counted])  # of the only layer
  (group,), (layer,) = found["groups"], found["layers"]
  got = [b["mass"] for b in group["buckets"]]
  np.testing.assert_allclose(got, mass.mean(axis=1), rtol=1e-5, atol=1e-8)
  error = mass.std(axis=1, ddof=1) / np.sqrt(counted.sum())
  got = [b["error"] for b in group["buckets"]]
  np.testing.assert_allclose(got, error, rtol=1e-3, atol=1e-8)
  assert group["samples"] == counted.sum() and sum(layer["mass"]) == pytest.approx(1)
  loss = want["losses"]["reconstruction"][0][counted]
  loss = loss[loss > 0]
  own = layer["losses"]["reconstruction"]
  assert own["mean"] == pytest.approx(loss.mean(), rel=1e-5)
  assert own["samples"] == len(loss) > 1 and own["error"] > 0
  visible = [b["visible"] for b in group["buckets"]]
  assert visible[0] is None  # four compressed slots have no sixths
  assert (visible[5] == 1) is full
  shown = text(found)
  for part in (f"{100 * layer['mass'][-1]:.3f}", f"{own['mean']:.4g}", "memory 6/6"):
    assert part in shown
  assert imread(folder / "attention.png").shape == (1600, 1600, 4)


def test_padding_does_not_count(folder, monkeypatch):
  whole = lambda *args: (own := tokenize(*args))._replace(flat=own.flat[:53])
  monkeypatch.setattr(module, "tokenize", whole)
  found = analyse(folder, rows=2, changes=["memory.size=24"])  # lanes of 27 tokens
  (group,), (layer,) = found["groups"], found["layers"]
  assert found["segments"] == 4 and group["samples"] == 2 * 3
  assert [bucket["keys"] for bucket in group["buckets"][6:12]] == [4] * 6
  assert layer["losses"]["reconstruction"]["mean"] is None  # nothing had left before
  assert "- ± -" in text(found)


@pytest.mark.parametrize(
  "options,named",
  [
    ({"rows": -1}, "rows=-1"),
    ({"segments": -1}, "segments=-1"),
    ({"split": "exam"}, "split='exam'"),
    ({"rows": 2, "segments": 1, "full": True}, "none of 1 segments in 2 rows counts"),
    ({"changes": ["memory.sise=3"]}, "memory.sise is 3, but the kind"),
  ],
)
def test_what_cannot_be(options, named):
  with pytest.raises(ValueError, match=named):
    analyse(workdir(), **options)
  assert not (workdir() / module.PLOT).exists()
