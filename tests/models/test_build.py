"""Settings that do not fit are refused while the model is built, by their key."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    {"memory": CONV | {"compressor": "max"}},
    r"memory\.compressor is 'max'",
  ),
  "loss": ({"memory": CONV | {"loss": "some"}}, r"memory\.loss is 'some'"),
  "ratio": ({"memory": {"kind": "grc", "ratio": 1.5}}, r"memory\.ratio is 1\.5"),
  "channels": (
    {"memory": {"kind": "grc", "ratio": 0.2}},
    r"memory\.ratio.*model\.heads = 2",
  ),
  "features": ({"memory": {"kind": "favor", "features": 0}}, r"memory\.features"),
  "relative sums": (
    {"model": {"positions": "relative"}, "memory": {"kind": "favor"}},
    r"model\.positions is 'relative'",
  ),
  "tbptt": ({"memory": {"kind": "grc"}, "tbptt": 1}, r"tbptt is 1.*2 or more"),
  "segment": ({"segment": 0}, r"segment is 0"),
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
