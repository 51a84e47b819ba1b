"""What a train state is made of."""

import jax

from cached_tx.memory import CompressiveMemory
from cached_tx.train.optimizer import AUXILIARY, MAIN
from cached_tx.train.state import labels
from tests.kinds import decoder, shapes


def test_what_an_auxiliary_loss_trains_is_told_memory_by_memory():
  memories = tuple(CompressiveMemory(4, 4, 2, "conv", x) for x in ("attention", "none"))
  model = decoder("compressive-conv", memories=memories)
  found = jax.tree_util.tree_leaves_with_path(labels(model, shapes(model)))
  kernels = {jax.tree_util.keystr(p): x for p, x in found if "compressor" in str(p)}
  first, second = sorted(kernels)
  assert "blocks_0" in first and kernels[first] == AUXILIARY
  assert "blocks_1" in second and kernels[second] == MAIN
  assert {x for p, x in found if "compressor" not in str(p)} == {MAIN}
