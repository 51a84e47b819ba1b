"""Settings that do not fit are refused while the model is built, by their key."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers import Adaptive
from cached_tx.memory import build_memory
from cached_tx.models import build_model
from cached_tx.types import Segment
from tests.kinds import B, C, decoder, text


def config(**changes):
  """A config that fits, but for `changes` of its sections."""
  model = {"layers": 2, "width": 16, "heads": 2, "mlp": 32, "positions": "rotary"}
  model |= {"dropout": 0.0, "dtype": "float32", "remat": "none", "pattern": ()}
  sections = {"model": model, "memory": {"kind": "xl", "size": 3}}
  for name in ("model", "memory"):
    sections[name] = sections[name] | changes.pop(name, {})
  return types.SimpleNamespace(**({"segment": C, "tbptt": 2} | sections | changes))


def test_a_config_becomes_its_model():
  model = build_model(config(memory={"kind": "xl", "size": 7}), vocab=11)
  assert (model.layers, model.segment, model.tbptt, model.vocab) == (2, C, 2, 11)
  assert model.memories[0].size == 7
  assert np.dtype(build_model(config(memory={"kind": "grc"}), 11).memories[0].dtype)


def test_a_config_chooses_its_vocabulary():
  settings = config(model={"vocabulary": {"cutoffs": [3, 5], "divisor": 2}})
  assert build_model(settings, 11).vocabulary == Adaptive((3, 5), 2)
  assert build_model(config(), 11).vocabulary is None


def test_a_pattern_names_its_memories():
  memory = {"near": {"kind": "xl", "size": 3}, "far": {"kind": "favor", "features": 8}}
  settings = config()
  settings.memory = memory
  settings.model["pattern"] = ("near", "far")
  kinds = [type(m).__name__ for m in build_model(settings, 11).memories]
  assert kinds == ["XLMemory", "FavorMemory"]
  settings.model["pattern"] = ("near", "fat")
  with pytest.raises(ValueError, match=r"model\.pattern names 'fat'"):
    build_model(settings, 11)


CONV = {"kind": "compressive", "size": 4, "compressed": 2}
REFUSED = {
  "heads": ({"model": {"heads": 3}}, r"model\.heads is 3.*model\.width 16"),
  "layers": ({"model": {"layers": 0}}, r"model\.layers is 0"),
  "remat": ({"model": {"remat": "some"}}, r"model\.remat is 'some'"),
  "positions": ({"model": {"positions": "learned"}}, r"model\.positions is 'learned'"),
  "odd heads": ({"model": {"width": 6}}, r"rotary.*model\.width"),
  "model option": ({"model": {"wide": 3}}, r"model\.wide is no option"),
  "not the model's": ({"model": {"tbptt": 3}}, r"model\.tbptt is no option"),
  "memory dtype": (
    {"memory": {"kind": "grc", "dtype": "bfloat16"}},
    r"memory\.dtype.*model\.dtype",
  ),
  "kind": ({"memory": {"kind": "lru"}}, r"memory\.kind is 'lru'.*xl"),
  "memory option": ({"memory": {"slots": 3}}, r"memory\.slots is 3, but .*has: size"),
  "size": ({"memory": {"size": -1}}, r"memory\.size is -1"),
  "rate": ({"memory": CONV | {"rate": 3}}, r"memory\.rate is 3.*divide.*segment"),
  "compressor": (
    {"memory": CONV | {"compressor": "median"}},
    r"memory\.compressor is 'median'.*most_used",
  ),
  "loss": ({"memory": CONV | {"loss": "some"}}, r"memory\.loss is 'some'"),
  "loss of nothing": (
    {"memory": CONV | {"compressor": "max"}},
    r"memory\.loss is 'attention'.*'max' has nothing to train",
  ),
  "unread option": (
    {"memory": CONV | {"order": "usage"}},
    r"memory\.order is 'usage'.*memory\.compressor 'conv' does not read",
  ),
  "unread loss option": (
    {"memory": CONV | {"loss": "none", "norm": "mse"}},
    r"memory\.norm is 'mse'.*memory\.loss 'none' does not read",
  ),
  "rate beyond the segment": (
    {"memory": CONV | {"rate": 5, "remainder": "drop"}},
    r"memory\.rate is 5.*segment of 4 would make none",
  ),
  "dilations": (
    {"memory": CONV | {"compressor": "dilated", "dilations": (0,)}},
    r"memory\.dilations is \(0,\)",
  ),
  "valid padding": (
    {
      "memory": CONV
      | {"compressor": "dilated", "dilations": (1,), "padding": "valid", "rate": 2}
    },
    r"memory\.rate is 2.*less the 1 .*newest 1 would be dropped",
  ),
  "no slots to train": (
    {"memory": CONV | {"compressed": 0}},
    r"memory\.compressed is 0",
  ),
  "weight": ({"memory": CONV | {"weight": 0.0}}, r"memory\.weight is 0\.0"),
  "overlap": ({"memory": CONV | {"overlap": -1}}, r"memory\.overlap"),
  "queries": (
    {"memory": CONV | {"size": 0, "queries": "later"}},
    r"memory\.queries is 'later'.*memory\.size 0",
  ),
  "tables": (
    {"memory": CONV | {"tables": "two"}},
    r"memory\.tables is 'two'.*model\.positions is 'rotary'",
  ),
  "tables of nothing": (
    {
      "memory": CONV
      | {"tables": "two", "compressed": 0, "compressor": "max", "loss": "none"}
    },
    r"memory\.tables is 'two' and memory\.compressed 0",
  ),
  "ratio": ({"memory": {"kind": "grc", "ratio": 1.5}}, r"memory\.ratio is 1\.5"),
  "channels": (
    {"memory": {"kind": "grc", "ratio": 0.2}},
    r"memory\.ratio.*model\.heads = 2",
  ),
  "cache": (
    {"memory": {"kind": "grc", "cache": "shared"}},
    r"memory\.cache is 'shared'.*causal.*stream",
  ),
  "attended": (
    {"memory": {"kind": "grc", "attend": "updated"}},
    r"memory\.attend is 'updated'.*stream scope.*previous: a causal",
  ),
  "frozen stream": (
    {"memory": {"kind": "grc", "eval_update": False}},
    r"memory\.eval_update is False",
  ),
  "inner": ({"memory": {"kind": "grc", "inner": -1}}, r"memory\.inner is -1"),
  "no channels": ({"memory": {"kind": "grc", "ratio": 0.01}}, r"0 channels"),
  "features": ({"memory": {"kind": "favor", "features": 0}}, r"memory\.features"),
  "kernel": (
    {"memory": {"kind": "favor", "kernel": "relu6"}},
    r"memory\.kernel is 'relu6'; one of positive",
  ),
  "projection": (
    {"memory": {"kind": "favor", "projection": "qr"}},
    r"memory\.projection is 'qr'; one of iid",
  ),
  "no projection": (
    {"memory": {"kind": "favor", "projection": "none"}},
    r"memory\.kernel 'positive' is made of random rows",
  ),
  "unused features": (
    {
      "memory": {"kind": "favor", "projection": "none", "kernel": "elu1", "features": 9}
    },
    r"leave it at 128",
  ),
  "redraw": (
    {"memory": {"kind": "favor", "redraw": -1}},
    r"memory\.redraw is -1; it counts training steps",
  ),
  "nothing to redraw": (
    {"memory": {"kind": "favor", "projection": "none", "kernel": "elu1", "redraw": 5}},
    r"memory\.redraw is 5, but memory\.projection 'none'",
  ),
  "step": ({"model": {"step": 3}}, r"model\.step is no option"),
  "relative sums": (
    {"model": {"positions": "relative"}, "memory": {"kind": "favor"}},
    r"model\.positions is 'relative'",
  ),
  "tbptt": ({"memory": {"kind": "grc"}, "tbptt": 1}, r"tbptt is 1.*2 or more"),
  "segment": ({"segment": 0}, r"segment is 0"),
  "clamp": ({"memory": {"clamp": -1}}, r"memory\.clamp is -1"),
  "clamped turns": (
    {"memory": {"clamp": 3}},
    r"memory\.clamp is 3.*model\.positions is 'rotary'",
  ),
  "same length": (
    {"memory": {"same_length": "on"}},
    r"memory\.same_length is 'on'.*tensorflow",
  ),
  "no key": (
    {"memory": {"same_length": "pytorch", "size": 0}},
    r"memory\.size 0.*set memory\.same_length",
  ),
  "start": ({"memory": {"start": "ones"}}, r"memory\.start is 'ones'.*zeros"),
  "zero keys with biases": (
    {"memory": {"start": "zeros"}},
    r"memory\.start is 'zeros'.*biases.*model\.positions",
  ),
  "norm of zeros": (
    {
      "model": {"norm": "pre_raw", "norm_bias": True, "positions": "none"},
      "memory": {"start": "zeros"},
    },
    r"memory\.start is 'zeros'.*model\.norm",
  ),
  "norm": ({"model": {"norm": "rms"}}, r"model\.norm is 'rms'.*post"),
  "norm of what is compressed": (
    {"model": {"norm": "pre_raw"}, "memory": CONV},
    r"model\.norm is 'pre_raw'.*memory\.loss",
  ),
  "dropout": ({"model": {"dropout": 1.5}}, r"model\.dropout is 1\.5.*below 1"),
  "attention dropout": (
    {"model": {"attention_dropout": 1.0}},
    r"model\.attention_dropout is 1\.0",
  ),
  "head width": ({"model": {"head_width": -1}}, r"model\.head_width is -1"),
  "norm epsilon": ({"model": {"norm_epsilon": 0.0}}, r"model\.norm_epsilon is 0\.0"),
  "vocabulary option": (
    {"model": {"vocabulary": {"cutoff": (3,)}}},
    r"model\.vocabulary\.cutoff is no option; there are: cutoffs, divisor",
  ),
  "cutoff": (
    {"model": {"vocabulary": {"cutoffs": 3}}},
    r"model\.vocabulary\.cutoffs is 3; it is a tuple",
  ),
  "cutoffs that fall": (
    {"model": {"vocabulary": {"cutoffs": (7, 3)}}},
    r"model\.vocabulary\.cutoffs is \(7, 3\).*increase.*11 ids",
  ),
  "cutoffs beyond": (
    {"model": {"vocabulary": {"cutoffs": (3, 11)}}},
    r"model\.vocabulary\.cutoffs is \(3, 11\).*below the 11 ids",
  ),
  "cutoff at no id": (
    {"model": {"vocabulary": {"cutoffs": (0, 3)}}},
    r"model\.vocabulary\.cutoffs is \(0, 3\).*above 0",
  ),
  "cutoff between ids": (
    {"model": {"vocabulary": {"cutoffs": (3.5,)}}},
    r"model\.vocabulary\.cutoffs is \(3\.5,\)",
  ),
  "divisor": (
    {"model": {"vocabulary": {"cutoffs": (3, 5), "divisor": 5}}},
    r"model\.vocabulary\.divisor is 5.*last of 3 clusters 1 channel of 16",
  ),
  "divisor of one": (
    {"model": {"vocabulary": {"divisor": 2}}},
    r"model\.vocabulary\.divisor is 2.*without model\.vocabulary\.cutoffs",
  ),
  "width of rows": (
    {"model": {"vocabulary": {"width": -1}}},
    r"model\.vocabulary\.width is -1",
  ),
  "ties of others": (
    {"model": {"vocabulary": {"cutoffs": (3,), "tied_projections": (True,)}}},
    r"model\.vocabulary\.tied_projections is \(True,\).*each of the 2 clusters",
  ),
  "ties of nothing": (
    {"model": {"vocabulary": {"cutoffs": (3,), "tied_projections": (True, False)}}},
    r"model\.vocabulary\.tied_projections.*cluster 0 has rows of width 16",
  ),
  "projections of nothing": (
    {"model": {"vocabulary": {"cutoffs": (3,), "project_same_width": True}}},
    r"model\.vocabulary\.project_same_width is True.*the divisor is 1",
  ),
  "tied turns": ({"model": {"tied_biases": True}}, r"model\.tied_biases.*relative"),
  "option of slots": (
    {"model": {"attention_dropout": 0.1}, "memory": {"kind": "grc"}},
    r"model\.attention_dropout is 0\.1.*GRCMemory.*memory\.kind",
  ),
  "norm of slots": (
    {"model": {"norm": "pre_raw"}, "memory": {"kind": "favor"}},
    r"model\.norm is 'pre_raw'.*FavorMemory",
  ),
}


@pytest.mark.parametrize("changes,message", REFUSED.values(), ids=REFUSED)
def test_a_setting_that_does_not_fit_is_named(changes, message):
  changes = {**changes}
  settings = config(**{k: v for k, v in changes.items() if k != "memory"})
  if "memory" in changes:
    base = {} if "kind" in changes["memory"] else settings.memory
    settings.memory = base | changes["memory"]
  with pytest.raises(ValueError, match=message):
    build_model(settings, 11)


def test_unknown_kinds_and_options_are_named():
  with pytest.raises(ValueError, match=r"memory\.kind is 'what'"):
    build_memory("what")
  with pytest.raises(
    ValueError, match=r"memory\.rate is 2, but the kind 'xl' has no such"
  ):
    build_memory("xl", rate=2)


@pytest.mark.parametrize(
  "length,padded", [(3, False), (6, False), (C, True), (8, True)]
)
def test_a_boundary_state_refuses_what_only_a_stream_takes(length, padded):
  model = decoder("xl")
  tokens, starts = (jnp.asarray(a) for a in text(0, length=length))
  segment = Segment(starts, jnp.ones_like(starts) if padded else None)
  with pytest.raises(ValueError, match=r"open_stream\(state\).*"):
    model.init(jax.random.key(0), tokens, model.initial_state(B), segment)
