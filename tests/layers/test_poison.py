"""What is masked is gone: no bit of it, not even of NaN, reaches an output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers import attention_for
from cached_tx.types import Segment
from tests.kinds import MEMORIES, B, C, D, jit

LAYERS = {
  f"{kind}-{i}": (memory, own.positions)
  for kind, own in MEMORIES.items()
  for i, memory in enumerate(own.memories)
  if kind in ("none", "xl-relative", "xl-zeros", "compressive-conv", "grc", "favor")
}
EACH = pytest.mark.parametrize("memory,positions", LAYERS.values(), ids=LAYERS)


def parameters(layer):
  rng = np.random.default_rng(0)
  x, starts = jnp.zeros((B, C, D)), jnp.zeros((B, C), bool)
  make = lambda: layer.init(
    jax.random.key(0), x, layer.initial_state(B), Segment(starts)
  )
  shapes = nn.meta.unbox(jax.eval_shape(make))["params"]
  return jax.tree.map(lambda a: np.float32(0.3 * rng.normal(size=a.shape)), shapes)


def layer_of(memory, positions):
  layer = attention_for(memory, width=D, heads=2, segment=C, positions=positions)
  return layer, parameters(layer)


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@EACH
def test_nan_at_padding(memory, positions):
  """Forward and backward, in the midst of a segment."""
  layer, params = layer_of(memory, positions)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(B, 6, D)).astype(np.float32)
  valid = np.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
  starts = np.array([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1]], bool)

  @jit
  def run(params, x):
    state = layer.open_stream(layer.initial_state(B), B)

    def total(params, x):
      segment = Segment(jnp.asarray(starts), jnp.asarray(valid))
      y, after, losses = layer.apply({"params": params}, x, state, segment)
      shown = jnp.where(valid[..., None], y, 0)
      return (shown**2).sum() + sum(
        (v.sum() for v in losses.values()), start=jnp.zeros(())
      ), (y, after)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

  want = run(params, x)
  got = run(params, np.where(valid[..., None], x, np.float32(np.nan)))
  assert_same_bits(got, want)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
  assert not np.asarray(got[0][1][0])[~valid].any()  # outputs at padding
  assert not np.asarray(got[1][1])[~valid].any()  # gradients there


@EACH
def test_large_numbers_in_other_documents_and_rows(memory, positions):
  layer, params = layer_of(memory, positions)
  rng = np.random.default_rng(2)
  x = rng.normal(size=(B, 3 * C, D)).astype(np.float32)
  starts = np.zeros((B, 3 * C), bool)
  starts[:, 0] = True
  starts[0, 6] = True  # the document under test: row 0, from 6 to 10
  starts[0, 10] = True

  @jit
  def run(params, x):
    state, outs = layer.initial_state(B), []
    for at in range(0, 3 * C, C):
      segment = Segment(jnp.asarray(starts[:, at : at + C]))
      y, state, _ = layer.apply({"params": params}, x[:, at : at + C], state, segment)
      outs.append(y)
    return jnp.concatenate(outs, axis=1)

  own = np.zeros((B, 3 * C, 1), bool)
  own[0, 6:10] = True
  want = run(params, x)
  got = run(params, np.where(own, x, np.float32(1e6) * np.sign(x)))
  np.testing.assert_array_equal(got[0, 6:10], want[0, 6:10])
  assert np.isfinite(got).all()
