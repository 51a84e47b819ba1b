"""Evaluation of a stream: what each segment reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.data import Tokens
from cached_tx.train.evaluation import STALE, Evaluator, Reading
from cached_tx.train.sharding import one_device
from tests.kinds import C, V, toy

SEGMENTS = 7


@pytest.mark.parametrize("memory,age", [("kept", 0), ("stale", STALE)])
def test_the_age_of_what_is_read(memory, age):
  flat = np.zeros(C * SEGMENTS + 1, np.uint8)
  tokens = Tokens(flat, np.zeros(1, np.int64), V - 1)
  model, mesh = toy("none").model, one_device()
  reading = Reading(model, tokens, rows=1, mesh=mesh, segments=SEGMENTS)
  evaluator = Evaluator(model, reading)
  calls = []

  def step(_, count, batch):  # the state counts the segments behind it
    calls.append(int(count))
    return (jnp.zeros(()), jnp.ones(())), count + 1

  reading.empty, evaluator._step = lambda: jnp.zeros(()), step
  evaluator(None, memory)
  read = calls if memory == "kept" else calls[::2]  # every other call only goes on
  assert read == [max(0, i - age) for i in range(SEGMENTS)]
