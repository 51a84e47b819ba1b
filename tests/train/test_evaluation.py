"""Evaluation of a stream: what each segment reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.data import Tokens
from cached_tx.train.evaluation import MEMORY, STALE, Evaluator, Reading
from cached_tx.train.sharding import one_device
from tests.kinds import C, V, toy

SEGMENTS = 7


@pytest.fixture
def evaluator():
  """Of a model whose memory counts, in row 0 by ones and in row 1 by tens.

  A segment's loss is the count that row 0 reads. Attributes: calls, the state that
  each pass began with, and fed, how many batches went to the device.
  """
  flat = np.zeros(2 * (C * SEGMENTS + 1), np.uint8)
  tokens = Tokens(flat, np.zeros(1, np.int64), V - 1)
  model, mesh = toy("none").model, one_device()
  reading = Reading(model, tokens, rows=2, mesh=mesh, segments=SEGMENTS)
  found = Evaluator(model, reading)
  found.calls, found.fed, feed = [], 0, reading.feed

  def step(_, state, *others):
    found.calls.append(state.tolist())
    return (state[0, 0], jnp.ones(())), state + jnp.array([[1.0, 10.0]])

  def counted(batch):
    found.fed += 1
    return feed(batch)

  reading.empty, found._step = lambda: jnp.zeros((1, 2)), step
  reading.feed = counted
  return found


READ = {
  "kept": [*range(SEGMENTS)],
  "zeroed": [0] * SEGMENTS,
  "shuffled": [10 * i for i in range(SEGMENTS)],
  "stale": [max(0, i - STALE) for i in range(SEGMENTS)],
}


@pytest.mark.parametrize(
  "memory,passes",
  [
    (["kept"], 1),
    (["zeroed"], 1),
    (["shuffled"], 2),
    (["stale"], 2),
    (["stale", "kept"], 2),
    (MEMORY, 4),
  ],
)
def test_what_is_read(evaluator, memory, passes):
  """All choices at once need one pass for each, and read the text once."""
  found = evaluator(None, memory)
  assert {name: own.nats for name, own in found.items()} == {
    name: sum(READ[name]) for name in memory
  }
  assert list(found) == list(memory)
  assert all(own.targets == SEGMENTS for own in found.values())
  assert len(evaluator.calls) == passes * SEGMENTS and evaluator.fed == SEGMENTS
  for name in memory:  # in their order, among those of the other choices
    calls = iter(call[0][0] for call in evaluator.calls)
    assert all(count in calls for count in READ[name])


def test_what_cannot_be(evaluator):
  for wrong in ((), ("kept", "lost")):
    with pytest.raises(ValueError, match="is unknown: one of kept, zeroed, shuffled"):
      evaluator(None, wrong)
  evaluator._reading.rows = 1
  with pytest.raises(ValueError, match="needs 2 rows"):
    evaluator(None, ("kept", "shuffled"))
  assert not evaluator.calls
