"""Keys of a config: all are checked, and few may be missing."""

import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from cached_tx.layers import Adaptive
from cached_tx.memory import build_memory
from cached_tx.models import build_model
from cached_tx.train.config import OPTIONAL, check, from_json, overridden, to_json
from configs.quickstart import get_config as quickstart
from configs.wikitext103_xl_large import get_config as wikitext


def with_model(config, **changes):
  plain = to_json(config)
  plain["model"] |= changes
  return plain


def test_few_keys_may_be_missing():
  plain = to_json(quickstart())
  assert not set(OPTIONAL["model"]) & plain["model"].keys()
  check(plain)
  check(with_model(quickstart(), norm="post", tied_biases=True))
  del plain["model"]["heads"]
  with pytest.raises(ValueError, match=r"config lacks model\.heads"):
    check(plain)


@pytest.mark.parametrize("key,near", [("norms", "norm"), ("vocabulry", "vocabulary")])
def test_an_unknown_key_is_refused(key, near):
  with pytest.raises(
    ValueError, match=rf"{key} does not exist; did you mean.*{near}\?"
  ):
    check(with_model(quickstart(), **{key: 1}))


@pytest.mark.parametrize(
  "change,message",
  [
    ("memory.size=abc", "memory.size is 'abc'; it is a whole number"),
    ("memory.size=1.5", "memory.size is 1.5; it is a whole number"),
    ("memory.size=true", "memory.size is True; it is a whole number"),
    ("memory.loss=0", "memory.loss is 0; it is text"),
    ("memory.weight=much", "memory.weight is 'much'; it is a number"),
    ("memory.dilations=2", "memory.dilations is 2; it is a tuple, each entry a whole"),
    ("memory.dilations=[1,2.5]", "memory.dilations is (1, 2.5); it is a tuple"),
    ("model.norm_bias=False", "model.norm_bias is 'False'; it is True or False"),
    ("model.norm_bias=1", "model.norm_bias is 1; it is True or False"),
    ("model.attention_dropout=x", "model.attention_dropout is 'x'; it is a number or"),
    ("model.vocabulary=5", "model.vocabulary is 5; it is a section with the keys cut"),
    ("model.vocabulary=abc", "model.vocabulary is 'abc'; it is a section"),
    ('model.vocabulary={"tied": 0}', "model.vocabulary.tied is 0; it is True or False"),
    ('model.vocabulary={"cutoffs": 9}', "model.vocabulary.cutoffs is 9; it is a tuple"),
  ],
)
def test_an_option_of_another_type_is_refused(change, message):
  """Whether or not the config has it already, from whose value a type could be told."""
  config = quickstart()
  with config.unlocked():
    config.memory = ConfigDict({"kind": "compressive"})
  with pytest.raises(ValueError, match=re.escape(message)):
    build_model(overridden(config, [change]), 257)


def test_a_section_of_a_pattern_is_named():
  config = quickstart()
  with config.unlocked():
    config.memory = ConfigDict({"a": {"kind": "xl"}, "b": {"kind": "none"}})
    config.model.pattern = ("a", "b")
  for key, value in (("clamp", "far"), ("foo", 1)):
    with config.unlocked():
      config.memory.a = ConfigDict({"kind": "xl", key: value})
    with pytest.raises(ValueError, match=rf"memory\.a\.{key} is {value!r}"):
      build_model(config, 257)


def test_numbers_of_numpy_are_numbers():
  assert build_memory("xl", size=np.int64(4)).size == 4
  assert build_memory("grc", ratio=np.float32(0.5)).ratio == 0.5


def test_options_of_the_right_type_are_taken():
  config = quickstart()
  with config.unlocked():
    config.memory = ConfigDict({"kind": "compressive", "compressor": "dilated"})
  changes = ["memory.weight=2", "memory.dilations=[1]", "memory.remainder=drop"]
  changes += ["model.norm_bias=true", "model.attention_dropout=null"]
  changes += ['model.vocabulary={"cutoffs": [9], "tied_projections": []}']
  model = build_model(overridden(config, changes), 257)
  assert (model.memories[0].weight, model.memories[0].dilations) == (2, (1,))
  assert (model.norm_bias, model.attention_dropout) == (True, None)
  assert model.vocabulary == Adaptive((9,))
  grc = build_memory("grc", attend=None, eval_update=True, ratio=1, dtype="bfloat16")
  assert grc.eval_update is True
  with pytest.raises(ValueError, match=r"'False'; it is True or False .* or None"):
    build_memory("grc", eval_update="False")


def test_a_section_within_the_model_survives_json():
  config = wikitext("smoke")
  again = from_json(json.loads(json.dumps(to_json(config))))
  model = build_model(config, 257)
  assert build_model(again, 257) == model
  assert model.vocabulary.tied_projections == (False, True, True, True)
  assert (model.norm, model.vocabulary.divisor) == ("post", 2)
  other = build_model(overridden(again, ["model.vocabulary.divisor=3"]), 257)
  assert other.vocabulary.divisor == 3
