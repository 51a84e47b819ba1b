"""Official weights become ours, or it is said why not.

That they give the official numbers: tests/models/test_transformer_xl.py.
"""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from cached_tx.convert import (
  convert,
  from_official_xl,
  model_from_official,
  read_weights,
)
from cached_tx.evaluate import evaluate
from cached_tx.layers import Adaptive
from cached_tx.memory import NoMemory, XLMemory
from cached_tx.train.config import from_json
from tests.official_xl import load as golden
from tests.official_xl import tf_model, torch_model

ADAPTIVE = "b_lm_adaptive_div1_tieproj"
UNTIED = "b_lm_adaptive_div4_lm1bstyle_untiedproj"
TENSORFLOW = "f_tf_adaptive_div2_wt103style"


def official(name):
  """A model, and its weights by their own names, in float32."""
  meta, arrays = golden(name)
  model = (tf_model if name.startswith("f_tf") else torch_model)(meta)
  weights = {
    key.removeprefix("param/"): np.float32(a)
    for key, a in arrays.items()
    if key.startswith("param/")
  }
  return model.clone(dtype="float32"), weights


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_files_are_read(ending, tmp_path):
  model, weights = official(ADAPTIVE)
  path = tmp_path / f"weights.{ending}"
  if ending == "npz":
    np.savez(path, **weights)
  else:
    safetensors.numpy.save_file(weights, path)
  params = from_official_xl(read_weights(path), model)
  np.testing.assert_array_equal(params["content_bias"], weights["r_w_bias"])
  assert params["content_bias"].dtype == np.float32


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_damaged_file_is_named(ending, tmp_path):
  path = tmp_path / f"model.{ending}"
  arrays = {"a": np.zeros((4, 4), np.float32)}
  if ending == "npz":
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file(arrays, path)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(
    ValueError, match=rf"model\.{ending} cannot be read as \.{ending}"
  ):
    read_weights(path)


def test_pickles_are_not_read(tmp_path):
  with pytest.raises(ValueError, match=r"model\.pt is neither .* can run code"):
    read_weights(tmp_path / "model.pt")
  path = tmp_path / "objects.npz"
  np.savez(path, a=np.array([{}], object))
  with pytest.raises(ValueError, match="allow_pickle"):
    read_weights(path)


def without(weights, *names):
  return {key: a for key, a in weights.items() if key not in names}


@pytest.mark.parametrize("name", [ADAPTIVE, UNTIED, TENSORFLOW])
def test_every_number_arrives_once(name):
  model, weights = official(name)
  copies = {key for key in weights if re.search(r"out_layers.*weight", key)}
  own = without(weights, *copies)
  ends = np.cumsum([a.size for a in own.values()])
  marked = {
    key: np.arange(end - a.size, end, dtype=np.float32).reshape(a.shape)
    for (key, a), end in zip(own.items(), ends, strict=True)
  }
  params = from_official_xl(marked, model)
  arrived = np.concatenate([np.ravel(a) for a in jax.tree.leaves(params)])
  np.testing.assert_array_equal(np.sort(arrived), np.arange(ends[-1]))
  from_official_xl(weights, model)
  for key in copies:  # they may be there, but as what they copy
    with pytest.raises(ValueError, match=f"\n  {key} differs from what"):
      from_official_xl(weights | {key: weights[key] + 1}, model)
  for key in own:
    with pytest.raises(ValueError, match=f"\n  {key} is missing"):
      from_official_xl(without(weights, key), model)


def test_what_does_not_fit_is_listed():
  model, weights = official(ADAPTIVE)
  weights["r_w_bias"] = weights["r_w_bias"].T
  weights["r_r_bias"] = np.zeros((2, 8), np.int32)
  weights["crit.extra"] = np.zeros(3)
  weights["pos_emb.inv_freq"] = np.ones(8, np.float32)
  with pytest.raises(ValueError) as error:
    from_official_xl(weights, model)
  assert str(error.value).splitlines() == [
    "the weights are not those of this model:",
    "  pos_emb.inv_freq differs from what the model has in its place",
    "  r_w_bias is float32 (8, 2), but the model has floats (2, 8)",
    "  r_r_bias is int32 (2, 8), but the model has floats (2, 8)",
    "  crit.extra is unknown",
  ]


def test_a_single_number_does_not_fit():
  model, weights = official(ADAPTIVE)
  name = "crit.out_layers.0.bias"
  with pytest.raises(ValueError, match=rf"\n  {name} is float32 \(\), but the model"):
    from_official_xl(weights | {name: np.array(1, np.float32)}, model)


def test_the_buffer_of_frequencies_is_known():
  model, weights = official(ADAPTIVE)
  weights["pos_emb.inv_freq"] = np.float32(1 / 10_000 ** (np.arange(0, 16, 2) / 16))
  from_official_xl(weights, model)


@pytest.mark.parametrize(
  "name,changes,message",
  [
    (ADAPTIVE, {"activation": "gelu"}, r"model\.activation is 'gelu'.*'relu'"),
    (ADAPTIVE, {"norm": "pre"}, r"model\.norm is 'pre'.*'post' or 'pre_raw'"),
    (ADAPTIVE, {"norm_epsilon": 1e-12}, r"model\.norm_epsilon is 1e-12.*1e-05"),
    (ADAPTIVE, {"tied_biases": False}, r"model\.tied_biases is False.*PyTorch"),
    (ADAPTIVE, {"output_bias": False}, r"model\.output_bias is False"),
    (ADAPTIVE, {"memories": (NoMemory(),)}, r"no NoMemory.*memory\.kind to xl"),
    (ADAPTIVE, {"vocabulary": None}, r"crit\.cluster_weight is unknown"),
    (
      ADAPTIVE,
      {"vocab": 62},
      r"emb_layers\.0\.weight is float32 \(60, 16\).*\(62, 16\)",
    ),
    (ADAPTIVE, {"head_width": 4}, r"r_w_bias is float32 \(2, 8\).*\(2, 4\)"),
    (UNTIED, {"vocabulary": Adaptive((20, 40), 4)}, r"emb_projs\.0 is unknown"),
    (TENSORFLOW, {"norm": "pre_raw"}, r"model\.norm is 'pre_raw'.*TensorFlow"),
    (
      TENSORFLOW,
      {"vocabulary": Adaptive((20, 40), 2, tied=False)},
      r"model\.vocabulary\.tied is False",
    ),
  ],
)
def test_another_model_is_refused(name, changes, message):
  model, weights = official(name)
  with pytest.raises(ValueError, match=message):
    from_official_xl(weights, model.clone(**changes))


def test_a_vocabulary_with_bos():
  """The last id is new: it is embedded as 0, and never predicted."""
  for name in (ADAPTIVE, UNTIED, TENSORFLOW):
    model, weights = official(name)
    params = from_official_xl(weights, model.clone(vocab=model.vocab + 1))
    last = [params[key] for key in sorted(params) if "tables" in key]
    divided = model.vocabulary.divisor > 1
    assert len(last[-1]["embedding"]) == (21 if divided else 61)
    np.testing.assert_array_equal(last[-1]["embedding"][-1], 0)
    assert params["output_bias"].shape == (61,) and params["output_bias"][-1] == -1e9


def test_layers_of_a_pattern_find_their_weights():
  model, weights = official(ADAPTIVE)
  one = from_official_xl(weights, model)["stack"]["blocks_0"]
  pair = model.clone(memories=(XLMemory(8), XLMemory(4)))
  two = from_official_xl(weights, pair)["stack"]
  for i in (0, 1):
    own = two[f"blocks_{i}"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(own, one["mlp"]["up"]["kernel"][i : i + 1])


SIZES = dict(n_token=9, n_layer=1, n_head=1, d_model=4, d_head=4, d_inner=4, tgt_len=4)


def test_official_hyper_parameters():
  model = model_from_official(
    {**SIZES, "attn_type": 0, "mem_len": 3, "same_length": True, "clamp_len": 2}
  )
  assert model.memories == (XLMemory(3, 2, "pytorch"),) and model.vocabulary is None
  assert (model.norm, model.tied_biases, model.norm_epsilon) == ("post", True, 1e-5)
  own = SIZES | dict(cutoffs=[3, 5], div_val=2, tie_projs=[False, True], dropatt=0.1)
  model = model_from_official(own, dropout=0.2)
  assert (model.attention_dropout, model.dropout) == (0.1, 0.2)
  ties = (False, True, False)
  assert model.vocabulary == Adaptive((3, 5), 2, 0, True, ties, True)
  model = model_from_official(own | {"proj_same_dim": False}, tensorflow=True)
  assert model.vocabulary == Adaptive((3, 5), 2, 0, True, ties, False)
  assert model.memories == (XLMemory(0, start="zeros"),)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"attn_type": 1}, r"'attn_type': 1.* no meaning"),
    ({"lr": 0.1}, r"none are missing, and \{'lr': 0\.1\} have no meaning"),
    ({"untie_r": True}, "untie_r"),
    ({"cutoffs": [5, 3]}, r"model\.vocabulary\.cutoffs is \(5, 3\).*increase"),
  ],
)
def test_hyper_parameters_without_meaning_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    model_from_official(SIZES | changes)
  with pytest.raises(ValueError, match=r"\['n_token'\] are missing"):
    model_from_official(without(SIZES, "n_token"))


def config_of(meta, folder):
  """A run's config for a model of the PyTorch code, its words being w0, w1, ..."""
  c = meta["config"]
  model = dict(layers=c["n_layer"], width=c["d_model"], heads=c["n_head"])
  model |= dict(mlp=c["d_inner"], activation="relu", positions="relative", dropout=0.0)
  model |= dict(dtype="float32", remat="none", unroll=1, pattern=(), norm="post")
  model |= dict(norm_bias=True, output_bias=True, tied_biases=True)
  model |= dict(vocabulary=dict(cutoffs=c["cutoffs"]))
  optimizer = dict(peak=1e-3, muon=0.0, warmup=0, floor=0.0, decay=0.0, b1=0.9)
  optimizer |= dict(b2=0.999, clip=0.0, accumulate=1, ema=0.0)
  data = dict(name="text", path=str(folder / "text"), tokenizer="words")
  return from_json(
    dict(
      seed=0,
      steps=4,
      batch=8,
      segment=meta["seg_lens"][0],
      segments=1,
      tbptt=1,
      log_every=1,
      data={**data, "vocab": str(folder / "words")},
      model=model,
      memory=dict(kind="xl", size=c["mem_len"]),
      optimizer=optimizer,
      mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),
      eval=dict(every=0, batch=8, segments=0),
      save=dict(every=0, keep=1),
    )
  )


def test_a_run_gives_the_official_numbers(tmp_path):
  """The file's own text, read by `evaluate` as the official iterator reads it."""
  meta, arrays = golden(ADAPTIVE)
  words = [*(f"w{i}" for i in range(meta["config"]["n_token"] - 2)), "<eos>", "<unk>"]
  (tmp_path / "words").write_text("".join(f"{word}\n" for word in words))
  for split in ("train", "validation", "test"):
    (tmp_path / "text" / split).mkdir(parents=True)
    lanes = arrays["tokens_stream_TB"].T.ravel()
    text = " ".join(words[i] for i in lanes)
    (tmp_path / "text" / split / "one").write_text(text)
  _, weights = official(ADAPTIVE)
  safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
  config = config_of(meta, tmp_path)
  run = tmp_path / "run"
  found = convert(config, tmp_path / "model.safetensors", run)
  assert found["vocab"] == len(words) + 1  # BOS
  count = sum(a.size for k, a in weights.items() if not k.startswith("crit.out_layers"))
  assert found["parameters"] == count + len(words) + 1 + meta["config"]["d_model"]
  counted = config.copy_and_resolve_references().unlock()
  counted.data.vocab = ""
  with pytest.raises(ValueError, match=r"data\.vocab is ''.*order of the weights' ids"):
    convert(counted, tmp_path / "model.safetensors", tmp_path / "other")
  with pytest.raises(ValueError, match="has a run: give a new --workdir"):
    convert(config, tmp_path / "model.safetensors", run)

  found = json.loads(json.dumps(evaluate(run, rows=2, ordered=True)))
  losses = [arrays[f"seg{t}/loss_per_position"] for t in range(len(meta["seg_lens"]))]
  want = np.concatenate(losses)
  assert (found["targets"], found["ordered"], found["step"]) == (want.size, True, 0)
  score = found["scores"]["kept"]
  assert score["loss"] == pytest.approx(want.mean(), rel=1e-6)
  assert score["word_perplexity"] is None
