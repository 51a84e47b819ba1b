"""What a model's parameters say at a glance."""

import numpy as np
import pytest

from cached_tx.memory import GRCMemory, XLMemory
from tests.kinds import decoder, parameters, toy


@pytest.mark.parametrize("kind", ["grc", "grc+xl"])
def test_every_head_of_every_layer_has_its_share(kind):
  own = toy(kind)
  got = own.model.gauges(own.params)
  gates = own.params["stack"]["blocks_0"]["attention"]["gate"]
  assert gates.shape == (2, 2) and set(got) == {
    f"gate/{layer}/{head}" for layer in range(2) for head in range(2)
  }
  for layer in range(2):
    for head in range(2):
      want = 1 / (1 + np.exp(-gates[layer, head]))
      np.testing.assert_allclose(got[f"gate/{layer}/{head}"], want, rtol=1e-6)


def test_layers_are_counted_through_the_pattern():
  model = decoder("grc", layers=4, memories=(XLMemory(3), GRCMemory(3)))
  params = parameters(model)
  got = model.gauges(params)
  assert set(got) == {f"gate/{layer}/{head}" for layer in (1, 3) for head in (0, 1)}
  gate = params["stack"]["blocks_1"]["attention"]["gate"]
  np.testing.assert_allclose(got["gate/3/1"], 1 / (1 + np.exp(-gate[1, 1])), rtol=1e-6)


def test_other_memories_have_none():
  own = toy("xl")
  assert own.model.gauges(own.params) == {}
