"""What holds of every attention of encoders: padding, lengths, options, cost."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from cached_tx.layers import GatedEncoderAttention
from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.memory import GRCMemory
from cached_tx.types import Segment
from tests.kinds import precision

D, H, K = 8, 2, 4
SIZES = {"heads": H, "head_width": K}
KINDS = {
  "transformer": {},
  "local": {"block": 4},
  "sparse": {"max_len": 40, "block": 4, "summary": 1},
  "longformer": {"window": 5, "global_tokens": 1},
  "bigbird": {"block": 2, "random": 1},
  "linear": {},
  "performer": {"features": 8, "projection": "iid"},
  "recurrent": {"segment": 4, "memory": {"kind": "xl", "size": 3}},
  "linformer": {"max_len": 40, "rank": 3},
  "synthesizer": {"max_len": 40, "mode": "factorized_random"},
  "reformer": {"chunk": 4, "hashes": 2},
  "sinkhorn": {"max_len": 40, "block": 4},
}
EACH = pytest.mark.parametrize("name", KINDS)


def made(name, **options):
  """The layer, and its parameters as they are at the start."""
  return _made(name, tuple(options.items()))


@functools.cache
def _made(name, options):
  layer = ATTENTIONS[name](**(SIZES | KINDS[name] | dict(options)))
  segment = Segment(jnp.zeros((1, 5), bool))
  make = jax.jit(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 5, D)), segment))
  return layer, make()["params"]


def inputs(rows, length, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, length, D)).astype(np.float32)


def apply(layer, params, x, lengths, **given):
  """Heads, 0 at padding."""
  valid = jnp.arange(x.shape[1])[None] < jnp.asarray(lengths)[:, None]
  segment = Segment(jnp.zeros(valid.shape, bool), valid)
  x = jnp.where(valid[..., None], x, 0)
  heads = layer.apply({"params": params}, x, segment, **given)
  return jnp.where(valid[..., None, None], heads, 0)


# Worst error measured, of outputs up to 6: 1.5e-6.
@EACH
def test_padding_behind_a_row_is_not_there(name):
  layer, params = made(name)
  x = inputs(3, 19)
  with precision("float32"):
    got = jax.jit(lambda x: apply(layer, params, x, [19, 11, 1]))(x)
    whole = lambda x: Segment(jnp.zeros(x.shape[:2], bool))
    alone = jax.jit(lambda x: layer.apply({"params": params}, x, whole(x)))
    want = alone(x[1:2, :11]), alone(x[2:, :1])
  np.testing.assert_allclose(got[1:2, :11], want[0], rtol=0, atol=5e-6)
  np.testing.assert_allclose(got[2:, :1], want[1], rtol=0, atol=5e-6)


# Worst error measured, of outputs up to 2: 0.014.
@pytest.mark.parametrize("name", ["linformer", "synthesizer", "sinkhorn"])
def test_bfloat16_is_near_float32(name):
  fine, params = made(name)
  coarse, _ = made(name, dtype=jnp.bfloat16)
  x = inputs(1, 9)
  want, got = (
    jax.jit(lambda x, o=o: apply(o, params, x, [7]))(x) for o in (fine, coarse)
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(got), want, rtol=0, atol=0.04)


@EACH
def test_a_row_of_padding_gives_zeros_and_finite_gradients(name):
  layer, params = made(name)

  def total(params, x):
    out = apply(layer, params, x, [0, 7])
    return (out**2).sum(), out

  slope = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (_, out), slopes = slope(params, inputs(2, 7))
  assert not out[0].any()
  assert out[1].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
  assert not slopes[1][0].any()


def temporary(name, length, **options):
  """Bytes beside arguments and results, of a forward and a backward pass."""
  layer, params = made(name, **options)
  total = lambda params, x: (apply(layer, params, x, [length - 1]) ** 2).sum()
  x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
  lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, x)
  return lowered.compile().memory_analysis().temp_size_in_bytes


COSTS = {
  "local": {"block": 64},
  "longformer": {"window": 128},
  "bigbird": {"block": 32},
  "linear": {},
  "performer": {},
  "sparse": {"max_len": 8192, "block": 64, "summary": 4},
  "recurrent": {"segment": 64, "memory": freeze({"kind": "xl", "size": 64})},
  "linformer": {"max_len": 8192},
  "reformer": {"chunk": 16},
  "sinkhorn": {"max_len": 8192, "block": 64},
}


@pytest.mark.parametrize("name", COSTS)
def test_memory_grows_with_the_number_of_tokens(name):
  """Four times as long: about four times as much, not sixteen times."""
  few, many = (temporary(name, length, **COSTS[name]) for length in (2048, 8192))
  assert many < 4.4 * few


def test_the_measure_sees_squares():
  """A Synthesizer's random table is of all pairs."""
  few, many = (
    temporary("synthesizer", length, mode="random", max_len=1024)
    for length in (256, 1024)
  )
  assert many > 8 * few


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("linear", "performer")])
def test_dropout_drops_weights(name):
  """The mean of many draws is what there is without."""
  layer, params = made(name, dropout=0.3)
  x = inputs(1, 9)

  def draw(key):
    rngs = {"dropout": key}
    return apply(layer, params, x, [8], deterministic=False, rngs=rngs)

  with precision("float32"):
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 1000))
    want = jax.jit(lambda x: apply(layer, params, x, [8]))(x)
  spread = draws.std(axis=0)
  assert spread.max() > 0.05
  error = np.abs(draws.mean(axis=0) - want) / np.maximum(spread, 1e-3)
  assert error.max() < 4.5 / 1000**0.5


WRONG = {
  "local": {"block": 0},
  "sparse": [{"block": -1}, {"summary": 5}, {"prefix": -1}, {"max_len": 0}],
  "longformer": [{"window": 0}, {"global_tokens": -1}],
  "bigbird": [{"block": 0}, {"random": -1}],
  "linear": {"dropout": 0.1},
  "performer": [{"dropout": 0.1}, {"kernel": "cosine"}, {"features": 0}],
  "linformer": [{"rank": 0}, {"share": "layers"}, {"max_len": 0}],
  "synthesizer": [
    {"mode": "sparse"},
    {"k": 0},
    {"max_len": 0},
    {"mixture": True, "dot_product": False},
  ],
  "reformer": [{"hashes": 0}, {"chunk": 0}, {"buckets": 3}],
  "sinkhorn": [
    {"block": 0},
    {"iterations": 0},
    {"temperature": 0.0},
    {"combine": "mean"},
    {"max_len": 0},
  ],
}
FAULTS = [
  (name, fault)
  for name, faults in WRONG.items()
  for fault in (faults if isinstance(faults, list) else [faults])
]


@pytest.mark.parametrize("name,fault", FAULTS)
def test_wrong_options_are_named(name, fault):
  layer = ATTENTIONS[name](**(SIZES | KINDS[name] | fault))
  key = next(iter(fault))
  key = {"dropout": "model.attention_dropout", "max_len": "max_len"}.get(
    key, f"attention.{key}"
  )
  with pytest.raises(ValueError, match=re.escape(key)):
    layer.check()


@pytest.mark.parametrize("name", ["linformer", "synthesizer", "sinkhorn"])
def test_rows_longer_than_what_was_learned_are_refused(name):
  layer, params = made(name)
  with pytest.raises(ValueError, match="max_len is 40, but there are 41 tokens"):
    apply(layer, params, inputs(1, 41), [41])


@EACH
def test_parameters_have_logical_axes(name):
  _, params = made(name, **{} if name in ("linear", "recurrent") else {"bias": True})
  boxes = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
  assert boxes
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  assert all(len(box.names) == box.value.ndim for box in boxes)


@EACH
def test_serves_beside_a_cache(name):
  """As the inner attention of a gated layer: the blend of equation 2, padding 0."""
  memory = GRCMemory(4, 0.5, cache="shared")
  inner = ATTENTIONS[name](H, D // H, **KINDS[name])
  layer = GatedEncoderAttention(D, H, memory, inner)
  valid = jnp.arange(9)[None] < jnp.array([[9], [4]])
  segment = Segment(jnp.zeros((2, 9), bool), valid)
  x, state = jnp.asarray(inputs(2, 9)), layer.initial_state()
  params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x, state, segment))

  def run(params, state, training):
    return layer.apply(params, x, state, segment, training=training)

  run = jax.jit(run, static_argnums=2)
  _, state, _ = run(params, state, True)
  assert state.filled[0]
  shares = {}
  for share in (-40.0, 0.0, 40.0):  # of the cache: none, half, all
    own = params["params"] | {"gate": jnp.full(H, share)}
    shares[share], after, _ = run({"params": own}, state, False)
    jax.tree.map(np.testing.assert_array_equal, after, state)
  got = (shares[-40.0] + shares[40.0]) / 2
  np.testing.assert_allclose(shares[0.0], got, rtol=0, atol=1e-5)
  assert np.abs(shares[40.0] - shares[-40.0])[:, :4].max() > 1e-2
  alone = {"params": params["params"].get("inner", {})}
  heads = inner.apply(alone, jnp.where(valid[..., None], x, 0), segment)
  output = params["params"]["output"]
  want = (
    jnp.einsum("blhk,hkd->bld", heads, output["kernel"]) + output["bias"][None, None]
  )
  want = jnp.where(valid[..., None], want, 0)
  np.testing.assert_allclose(shares[-40.0], want, rtol=0, atol=1e-5)


def features_of(name, inner, x):
  """Phi in float64, of vectors ... E: what a dense reader of the cache is made of."""
  if name == "linear":
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  rows = np.float64(inner._favor(x.shape[-1]).draw())
  x = x * x.shape[-1] ** -0.25
  return np.exp(x @ rows.T - (x**2).sum(axis=-1, keepdims=True) / 2)


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_a_cache_is_read_by_the_same_features(name):
  """Slots of which some hold nothing, beside a sum over all pairs in float64."""
  E = 3
  with precision("float64"):
    inner = ATTENTIONS[name](H, K, **KINDS[name])
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, n, H, E)) for n in (7, 5, 5))
    shown = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0]], bool)
    read = jax.jit(inner.reader(E))
    got = read(q * E**-0.5, k, v, shown[:, None])
    a, b = (features_of(name, inner, x) for x in (q, k))
    weights = np.einsum("blhm,bshm->blhs", a, b) * shown[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
      got, np.einsum("blhs,bshk->blhk", weights, v), rtol=0, atol=1e-12
    )
