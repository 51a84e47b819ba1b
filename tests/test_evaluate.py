"""Evaluation of a checkpoint on a whole split."""

import json
import math

import jax
import numpy as np
import pytest

from cached_tx.data import counts, documents, tokenize
from cached_tx.evaluate import evaluate, text, usable_mesh
from cached_tx.load import load
from cached_tx.train.experiment import Experiment
from tests.trained import workdir

MEMORIES = ("kept", "zeroed", "shuffled", "stale")


def test_scores_are_those_of_the_model_read_by_hand():
  """One row, from an empty memory, over the first segments of the text."""
  found = evaluate(workdir(), rows=1, segments=5)
  own = load(workdir())
  tokens = tokenize(documents("web_en", "test"), own.tokenizer).flat[:41].astype(int)
  logits, _ = own(tokens[None, :-1], own.state)
  losses = -np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(40), tokens[1:]]
  losses = losses[tokens[1:] != own.tokenizer.bos]
  score = found["scores"]["kept"]
  assert found["targets"] == len(losses)
  assert score["loss"] == pytest.approx(losses.mean(), rel=1e-5)
  assert score["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
  assert score["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
  assert score["word_perplexity"] is None and not found["whole"]
  assert (found["step"], found["rows"], found["devices"]) == (4, 1, 1)


def test_a_whole_split():
  found = json.loads(json.dumps(evaluate(workdir(), split="validation", rows=512)))
  size = counts(documents("web_en", "validation"))
  assert found["whole"] and found["targets"] == found["bytes"] == size.bytes
  assert (found["words"], found["words_rule"]) == (size.words, size.rule)
  nats = found["scores"]["kept"]["loss"] * size.bytes
  per_word = found["scores"]["kept"]["word_perplexity"]
  assert per_word == pytest.approx(math.exp(nats / size.words), rel=1e-9)
  assert found["devices"] == 8  # the mesh that trained it
  lines = text(found)
  for part in ("validation, whole split", f"{size.words:,} words", "512 rows", "12\n"):
    assert part in lines


def test_memories_and_their_sizes_are_a_choice():
  options = {"rows": 4, "segments": 6, "memory": MEMORIES}
  found = evaluate(workdir(), **options)
  losses = {name: score["loss"] for name, score in found["scores"].items()}
  assert list(losses) == list(MEMORIES) and len(set(losses.values())) == 4
  longer = evaluate(workdir(), changes=["memory.size=24", "segment=16"], **options)
  assert longer["attended_slots"] == [28] and longer["segment"] == 16
  assert longer["scores"]["kept"]["loss"] != losses["kept"]
  assert "memory.size=24, segment=16" in text(longer)
  older = evaluate(workdir(), step=2, **options)
  assert older["step"] == 2 and older["scores"]["kept"]["loss"] != losses["kept"]


def test_one_ordered_text():
  """Without BOS, in equal lanes: the model read by hand."""
  found = evaluate(workdir(), rows=2, segments=2, ordered=True)
  own = load(workdir(), batch=2)
  flat = tokenize(documents("web_en", "test"), own.tokenizer).flat.astype(int)
  flat = flat[flat != own.tokenizer.bos]
  lanes = flat[: len(flat) // 2 * 2].reshape(2, -1)[:, :17]
  logits, _ = own(lanes[:, :-1], own.state)
  losses = -np.asarray(jax.nn.log_softmax(logits))
  losses = np.take_along_axis(losses, lanes[:, 1:, None], axis=2)
  assert (found["targets"], found["ordered"]) == (32, True)
  assert found["scores"]["kept"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
  assert "as one text in equal lanes, its tail dropped" in text(found)


def test_a_perplexity_beyond_every_float_is_a_dash():
  found = evaluate(workdir(), rows=1, segments=1)
  found["scores"]["kept"]["perplexity"] = None
  assert text(found).splitlines()[-3].split() == [
    *("kept", f"{found['scores']['kept']['bits_per_byte']:.4f}"),
    *(f"{found['scores']['kept']['loss']:.4f}", "-", "-"),
  ]


@pytest.mark.parametrize(
  "own,said",
  [
    ({}, "perplexity: larger than any float"),
    ({"whole": False}, "only where a whole split is read, without --segments"),
    ({"ordered": True}, "not with --ordered"),
    ({"words": 0}, "the text has no words"),
  ],
)
def test_a_dash_is_explained(own, said):
  score = {"loss": 1.0, "bits_per_byte": 1.0, "perplexity": 3.0}
  found = {
    "data": "text", "split": "test", "whole": True, "ordered": False, "targets": 1,
    "bytes": 1, "documents": 1, "words": 1, "words_rule": "spaces", "step": 1,
    "rows": 1, "devices": 1, "segment": 8, "attended_slots": [None], "set": [],
    "scores": {"kept": {**score, "word_perplexity": None}}, **own,
  }  # fmt: skip
  assert said in text(found).splitlines()[-1]
  assert "1 token predicted of 1 byte in 1 document, " in text(found)
  assert "1 row on 1 device, " in text(found)
  found["scores"]["kept"]["word_perplexity"] = 2.0
  assert text(found).splitlines()[-1].startswith("kept")


@pytest.mark.parametrize("rows,devices", [(16, 8), (4, 1), (1, 1)])
def test_the_mesh_fits_the_rows(rows, devices):
  assert usable_mesh(Experiment.of(workdir()), rows).size == devices


@pytest.mark.parametrize(
  "options,said",
  [
    ({"memory": ["kept", "lost"]}, "memory='lost' is unknown"),
    ({"segments": -1}, "segments=-1"),
  ],
)
def test_what_is_wrong_is_told_before_anything_is_read(monkeypatch, options, said):
  never = lambda *_: pytest.fail("read")
  monkeypatch.setattr("cached_tx.evaluate.tokenize", never)
  monkeypatch.setattr(Experiment, "restore_params", never)
  with pytest.raises(ValueError, match=said):
    evaluate(workdir(), **options)


@pytest.mark.parametrize(
  "options,named",
  [
    ({"memory": ["lost"]}, "memory='lost' is unknown"),
    ({"memory": ["shuffled"], "rows": 1}, "needs 2 rows"),
    ({"split": "exam"}, "split='exam'"),
    (
      {"changes": ["memory.sise=3"]},
      r"memory\.sise is 3, but .* has no such option; .*size",
    ),
    ({"changes": ["eval.rows=3"]}, r"eval\.rows does not exist; did you mean .*\?"),
    (
      {"changes": ["model.width=16"]},
      r"(?s)wanted float32.*Set was model\.width=16\. After training may be set what",
    ),
    ({"rows": -1}, "rows=-1"),
    ({"segments": -1}, "segments=-1"),
  ],
)
def test_what_cannot_be(options, named):
  with pytest.raises(ValueError, match=named):
    evaluate(workdir(), **options)
