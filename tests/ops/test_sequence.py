import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from cached_tx.ops.favor import favor_attention, no_sums
from cached_tx.ops.sequence import favor_over
from cached_tx.types import Segment
from tests.kinds import precision

B, L, H, K, R = 2, 64, 2, 6, 10
OPTIONS = {"chunk": 4, "span": 8}
SPLIT = PartitionSpec(None, "sequence")
SAME = PartitionSpec()


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (0.7 * rng.normal(size=(B, L, H, K)) for _ in "qkv")
  starts = rng.random((B, L)) < 0.05
  starts[1, 8:] = False  # a document that covers seven devices
  return q, k, v, rng.normal(size=(R, K)), starts, rng.random((B, L)) < 0.9


def alone(q, k, v, w, starts, valid, sums):
  return favor_attention(q, k, v, w, Segment(starts, valid), sums, **OPTIONS)


def over(devices):
  mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(AxisType.Auto,))

  def own(q, k, v, w, starts, valid, sums):
    given = (q, k, v, w, Segment(starts, valid), sums)
    return favor_over("sequence", *given, **OPTIONS)

  return jax.shard_map(
    own,
    mesh=mesh,
    in_specs=(SPLIT, SPLIT, SPLIT, SAME, SPLIT, SPLIT, SAME),
    out_specs=(SPLIT, SAME),
    check_vma=False,
  )


def results(attend):
  """Output, sums, and gradients of both by q, k, v and the sums before."""
  q, k, v, w, starts, valid = (jnp.asarray(x) for x in arrays())
  direction = np.random.default_rng(9).normal(size=v.shape)
  _, sums = jax.jit(alone)(*arrays(1)[:4], starts, valid, no_sums(B, H, R, K, q.dtype))

  @jax.jit
  def total(q, k, v, sums):
    out, after = attend(q, k, v, w, starts, valid, sums)
    both = (out * direction).sum() + (after.values**2).sum() + after.keys.sum()
    return both, (out, after)

  return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, sums)


# Worst error measured on CPU, relative to the largest number: 3e-15.
@pytest.mark.parametrize("devices", [2, 8])
def test_many_devices_compute_what_one_does(devices):
  with precision("float64"):
    want, got = results(alone), results(over(devices))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(np.abs(b).max(), 1e-9))


def crossing(function, *args):
  """What crosses devices in the compiled program: operations, and bytes of each."""
  text = jax.jit(function).lower(*args).compile().as_text()
  names = r"((?:all-|reduce-scatter|collective-)[\w-]*)\("
  found = re.findall(r"= f32\[([\d,]*)\]\S* " + names, text)
  assert len(found) == len(re.findall(r" " + names, text))  # none of another type
  return [(name, 4 * int(np.prod([*map(int, s.split(","))]))) for s, name in found]


def test_programs_are_no_longer_for_more_devices():
  """Forward and backward, of as many tokens per device."""

  def lines(devices):
    q, k, v, w, *masks = (jnp.asarray(x) for x in arrays())
    q, k, v, *masks = (x[:, : 8 * devices] for x in (q, k, v, *masks))
    sums = no_sums(B, H, R, K, q.dtype)
    total = lambda q, k, v, sums: over(devices)(q, k, v, w, *masks, sums)[0].sum()
    slope = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    return len(slope.lower(q, k, v, sums).as_text().splitlines())

  assert lines(2) == lines(8)


def test_only_the_sums_of_each_device_cross():
  q, k, v, w, starts, valid = (jnp.asarray(x) for x in arrays())
  q, k, v, w = (x.astype(jnp.float32) for x in (q, k, v, w))
  sums = no_sums(B, H, R, K)
  attend = over(8)
  state = B * H * (R * (K + 1) + 2) * 4
  assert crossing(attend, q, k, v, w, starts, valid, sums) == [
    ("all-gather", 8 * state)
  ]

  def slopes(q, k, v):
    out, pull = jax.vjp(lambda *x: attend(*x, w, starts, valid, sums)[0], q, k, v)
    return pull(out)

  found = sorted(crossing(slopes, q, k, v))
  assert found == [("all-gather", 8 * state), ("reduce-scatter", state)]
