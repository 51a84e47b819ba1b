"""Attentions of encoders beside dense definitions of their papers, in float64."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.ops import fixed
from cached_tx.ops.bigbird import priorities
from cached_tx.types import Segment
from tests.kinds import precision
from tests.reference import long_range

B, L, D, H, K = 3, 23, 7, 2, 4
MAX = 26


class Case(NamedTuple):
  """An attention, its options, and its definition: of params, x, places, and these."""

  name: str
  options: dict[str, Any]
  rule: Any
  given: dict[str, Any] = {}  # noqa: RUF012


def synthesizer(mode, dot_product, **options):
  options = {"max_len": MAX, "mode": mode, "dot_product": dot_product} | options
  given = {"mode": mode, "dot_product": dot_product}
  return Case("synthesizer", options, long_range.synthesizer, given)


def reformer(chunk, hashes, following=False, buckets=None):
  given = {"chunk": chunk, "following": following, "buckets": buckets}
  options = {"hashes": hashes, "seed": 3, "layer": 1} | given
  return Case("reformer", options, long_range.reformer, given)


def sinkhorn(**options):
  usual = {"block": 5, "iterations": 3, "temperature": 0.75, "combine": "joint"}
  options = usual | options
  return Case("sinkhorn", {"max_len": MAX} | options, long_range.sinkhorn, options)


def local(**options):
  return Case("local", options, long_range.local, options)


def sparse(block, summary, prefix):
  given = {"block": block, "summary": summary, "prefix": prefix}
  return Case("sparse", {"max_len": MAX} | given, long_range.sparse, given)


def longformer(window, global_tokens):
  given = {"window": window, "global_tokens": global_tokens}
  return Case("longformer", given, long_range.longformer, given)


def bigbird(block, random):
  options = {"block": block, "random": random, "seed": 2, "layer": 3}
  preferred = priorities(2, 3, H, -(-L // block))
  given = {"block": block, "random": random, "preferred": preferred}
  return Case("bigbird", options, long_range.bigbird, given)


CASES = {
  "transformer": Case("transformer", {"bias": True}, long_range.transformer),
  "linear": Case("linear", {}, long_range.katharopoulos),
  "performer": Case(
    "performer", {"features": 9, "projection": "iid"}, long_range.performer
  ),
  "performer relu": Case(
    "performer", {"kernel": "relu", "projection": "none"}, long_range.performer_relu
  ),
  "linformer": Case("linformer", {"max_len": MAX, "rank": 3}, long_range.linformer),
  "linformer headwise": Case(
    "linformer", {"max_len": MAX, "rank": 3, "share": "headwise"}, long_range.linformer
  ),
  "synthesizer dense": synthesizer("dense", False, bias=True),
  "synthesizer dense mixed": synthesizer("dense", True, mixture=True),
  "synthesizer random": synthesizer("random", False),
  "synthesizer random added": synthesizer("random", True),
  "synthesizer random mixed": synthesizer("random", True, mixture=True),
  "synthesizer factorized": synthesizer("factorized_random", False, k=2),
  "synthesizer factorized added": synthesizer("factorized_random", True, k=2),
  "reformer": reformer(4, 1),
  "reformer, rounds": reformer(4, 3),
  "reformer, following": reformer(3, 2, following=True, buckets=4),
  "reformer, one chunk": reformer(64, 2),
  "sinkhorn": sinkhorn(),
  "sinkhorn sum": sinkhorn(combine="sum", iterations=1),
  "sinkhorn, one block": sinkhorn(block=64),
  "local": local(block=5),
  "local, one block": local(block=50),
  "sparse": sparse(5, 2, 1),
  "sparse, causal": sparse(4, 1, 0),
  "sparse, one block": sparse(40, 3, 2),
  "longformer": longformer(4, 2),
  "longformer, no global token": longformer(7, 0),
  "longformer, wide": longformer(64, 1),
  "bigbird": bigbird(2, 2),
  "bigbird, one random block": bigbird(3, 1),
  "bigbird, few blocks": bigbird(10, 3),
  "bigbird, one block": bigbird(64, 3),
}
ONE = ["transformer", "linear", "performer", "linformer", "sinkhorn"]
ONE += ["local", "sparse", "longformer", "bigbird"]
ONE += ["reformer, rounds", "synthesizer dense", "synthesizer factorized"]


def attention(case, dtype, **options):
  options = {"heads": H, "head_width": K, "dtype": dtype} | case.options | options
  return ATTENTIONS[case.name](**options)


def inputs(dtype, holes=False):
  """x, which at padding must not matter, and what is real. One row is all padding."""
  rng = np.random.default_rng(5)
  x = rng.normal(size=(B, L, D)).astype(dtype)
  valid = np.arange(L) < np.array([L, 14, 0])[:, None]
  if holes:
    valid[:2] &= rng.random((2, L)) < 0.7
    valid[:2, 0] = True
  return np.where(valid[..., None], x, 10 * x).astype(dtype), valid


def rows_of(layer):
  """Drawn outside of the compiled program, where they would be rounded otherwise."""
  with jax.ensure_compile_time_eval():
    return layer.draw()


def parameters(layer, dtype):
  segment = Segment(jnp.zeros((1, L), bool))
  make = lambda: layer.init(jax.random.key(0), jnp.zeros((1, L, D)), segment)
  shapes = nn.meta.unbox(jax.eval_shape(make))["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda a: (0.7 * rng.normal(size=a.shape)).astype(dtype), shapes)


def run(case, params, x, valid, dtype, **options):
  layer = attention(case, dtype, **options)
  segment = Segment(jnp.zeros(valid.shape, bool), jnp.asarray(valid))
  given = {} if case.rule is not long_range.performer else {"rows": rows_of(layer)}
  out = layer.apply({"params": params}, x, segment, **given)
  return jnp.where(segment.real[..., None, None], out, 0)


def defined(case, layer, params, x, valid):
  """The definition, on the real tokens of each row."""
  given = dict(case.given)
  if case.name == "reformer":
    given["rotations"] = np.float64(layer.draw(L))
  if case.rule is long_range.performer:
    given["rows"] = np.float64(rows_of(layer))
  out = np.zeros((B, L, H, K), np.result_type(x, *jax.tree.leaves(params)))
  for row, own in enumerate(valid):
    (places,) = np.nonzero(own)
    if len(places):
      out[row, places] = case.rule(params, x[row, places], places, **given)
  return out


def compared(case, dtype, holes):
  """Largest errors of outputs and of slopes along random directions."""
  with precision(dtype):
    layer = attention(case, dtype)
    params = parameters(layer, "float64")
    x, valid = inputs("float64", holes)
    weights = np.random.default_rng(2).normal(size=(B, L, H, K))
    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))

    def total(params, x):
      out = run(case, params, x, valid, dtype)
      return (out * cast(weights)).sum(), out

    slope = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, out), slopes = jax.jit(slope)(cast(params), cast(x))
    want = defined(case, layer, params, x, valid)
    errors = [np.abs(np.float64(out) - want).max()]
    leaves, tree = jax.tree.flatten((params, x))
    rng = np.random.default_rng(3)
    for i, found in enumerate(jax.tree.leaves(slopes)):
      way = rng.normal(size=leaves[i].shape)
      if leaves[i] is leaves[-1]:
        way = np.where(valid[..., None], way, 0)
      moved = [a + (1e-30j * way if i == j else 0) for j, a in enumerate(leaves)]
      moved = defined(case, layer, *jax.tree.unflatten(tree, moved), valid)
      exact = (moved.imag * weights).sum() / 1e-30
      scale = max(1.0, np.linalg.norm(np.float64(found)))
      errors.append(abs((np.float64(found) * way).sum() - exact) / scale)
    return errors


# Worst errors measured: 1.1e-14 here, 5.8e-6 in float32.
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_the_definition(case):
  assert max(compared(case, "float64", holes=True)) < 1e-12


@pytest.mark.parametrize("name", ONE)
def test_float32_is_near_the_definition(name):
  assert max(compared(CASES[name], "float32", holes=False)) < 1e-5


@pytest.mark.parametrize("name", ["sparse", "sparse, causal"])
def test_sparse_attention_of_a_few_blocks_at_a_time(name, monkeypatch):
  """As rows of more than 512 tokens are: groups of 10 queries here, the last short."""
  monkeypatch.setattr(fixed, "QUERIES", 10)
  for holes in (False, True):
    assert max(compared(CASES[name], "float64", holes)) < 1e-12
