"""Keys of a config: all are checked, and few may be missing."""

import json

import pytest

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


def test_a_section_within_the_model_survives_json():
  config = wikitext("smoke")
  again = from_json(json.loads(json.dumps(to_json(config))))
  model = build_model(config, 257)
  assert build_model(again, 257) == model
  assert model.vocabulary.tied_projections == (False, True, True, True)
  assert (model.norm, model.vocabulary.divisor) == ("post", 2)
  other = build_model(overridden(again, ["model.vocabulary.divisor=3"]), 257)
  assert other.vocabulary.divisor == 3
