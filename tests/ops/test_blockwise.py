from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.bits import Drop, kept, words
from cached_tx.ops.blockwise import Relative, blockwise_attention
from cached_tx.ops.sight import Sight
from tests.kinds import jit, precision

B, H, K = 2, 3, 5
KEY = jax.random.key(4)


class Case(NamedTuple):
  """Sizes, what hides keys, and how blocks are cut."""

  queries: int
  keys: int
  size: tuple[int, int] = (3, 4)
  options: dict[str, Any] = {}  # noqa: RUF012
  documents: bool = False
  valid: bool = False
  mask: int = 0  # 1: the same for all queries, 2: of each
  places: bool = False
  zeros: bool = False
  relative: bool = False
  rate: float = 0.0


CASES = {
  "causal": Case(8, 8, (4, 4)),
  "odd": Case(7, 7, (3, 2)),
  "one block": Case(7, 12, (16, 16)),
  "memory": Case(7, 12, (3, 4)),
  "one query": Case(1, 9, (1, 4), relative=True),
  "not causal": Case(5, 9, (2, 4), {"causal": False}, valid=True),
  "offset": Case(4, 11, (3, 4), {"offset": 3}, relative=True),
  "window": Case(13, 17, (2, 2), {"window": 5}),
  "documents": Case(13, 17, (4, 3), documents=True),
  "padding": Case(6, 13, (4, 4), documents=True, valid=True, relative=True),
  "mask of keys": Case(5, 9, (2, 4), {"causal": False}, mask=1),
  "mask": Case(6, 9, (4, 4), mask=2, valid=True),
  "places": Case(6, 9, (4, 4), {"window": 4}, places=True),
  "relative": Case(7, 12, (3, 4), {"window": 9}, relative=True),
  "relative, one block": Case(7, 12, (7, 12), relative=True),
  "zeros": Case(7, 12, (3, 4), documents=True, zeros=True, relative=True),
  "all": Case(
    13, 21, (4, 8), {"window": 11}, True, True, 2, zeros=True, relative=True, rate=0.3
  ),
}


class Given(NamedTuple):
  """Arrays of a case, in NumPy; gradients flow to the first five."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  far: np.ndarray  # the queries of the relative terms
  r: np.ndarray
  slope: np.ndarray
  sight: Sight
  mask: np.ndarray | None
  seen: np.ndarray  # B Q S
  counts: np.ndarray  # B Q S, False: as a zero token
  kept: np.ndarray  # B H Q S: what weights are multiplied by


def given(case: Case, seed: int = 0) -> Given:
  rng = np.random.default_rng(seed)
  Q, S = case.queries, case.keys
  q, far, slope = (rng.normal(size=(B, Q, H, K)) for _ in range(3))
  k, v = (rng.normal(size=(B, S, H, K)) for _ in range(2))
  r = rng.normal(size=(S + 2, H, K))
  sight, mask = Sight(), None
  seen = np.ones((B, Q, S), bool)
  offset = case.options.get("offset", S - Q)
  here = np.broadcast_to(offset + np.arange(Q), (B, Q))
  there = np.broadcast_to(np.arange(S), (B, S))
  if case.places:
    here, there = rng.integers(S, size=(B, Q)), rng.integers(S, size=(B, S))
    sight = sight._replace(query_places=here, key_places=there)
  if case.documents:
    documents = np.cumsum(rng.random((B, S)) < 0.2, axis=1)
    asked = np.take_along_axis(documents, np.asarray(here), axis=1)
    seen &= documents[:, None] == asked[:, :, None]
    sight = sight._replace(query_documents=asked, key_documents=documents)
  if case.valid:
    valid = rng.random((B, S)) < 0.7
    valid[0, -3:] = False
    seen &= valid[:, None]
    sight = sight._replace(key_valid=valid)
  if case.mask:
    mask = rng.random((B, Q if case.mask == 2 else 1, S)) < 0.6
    seen &= mask
  counts = np.ones_like(seen)
  if case.zeros:
    first = np.maximum(here - rng.integers(9, size=(B, Q)), 0)
    sight = sight._replace(zeros=np.stack([first, first + 2], axis=2))
    zeros = (there[:, None] >= first[..., None]) & (
      there[:, None] < first[..., None] + 2
    )
    seen, counts = seen | zeros, ~zeros
  if case.options.get("causal", True):
    seen &= there[:, None] <= here[:, :, None]
  if "window" in case.options:
    seen &= here[:, :, None] - there[:, None] < case.options["window"]
  stays = np.ones((B, H, Q, S))
  if case.rate:
    stays = np.swapaxes(kept(words(KEY, (H, B, Q), S), case.rate), 0, 1)
    stays = stays / (1 - case.rate)
  sight = Sight(
    *(
      x if x is None or x.dtype == bool else np.asarray(x, np.int32) for x in sight
    )
  )
  return Given(q, k, v, far, r, slope, sight, mask, seen, counts, stays)


def reference(case: Case, own: Given) -> tuple[np.ndarray, list[np.ndarray]]:
  """The output, and the gradients of its product with the slope, query by query."""
  out = np.zeros_like(own.q)
  dq, dk, dv, dfar, dr = grads = [np.zeros_like(x) for x in own[:5]]
  offset = case.options.get("offset", case.keys - case.queries)
  for b, i, h in np.ndindex(B, case.queries, H):
    js = np.flatnonzero(own.seen[b, i])
    if not len(js):
      continue
    counts = own.counts[b, i, js]
    scores = np.where(counts, own.k[b, js, h] @ own.q[b, i, h], 0)
    rows = len(own.r) - 1 - (offset + i - js)
    if case.relative:
      scores = scores + own.r[rows, h] @ own.far[b, i, h]
    p = np.exp(scores - scores.max())
    p = p / p.sum()
    stays = own.kept[b, h, i, js] * counts
    out[b, i, h] = (p * stays) @ own.v[b, js, h]
    g = own.slope[b, i, h]
    dv[b, js, h] += np.outer(p * stays, g)
    dp = stays * (own.v[b, js, h] @ g)
    ds = p * (dp - p @ dp)
    if case.relative:
      dfar[b, i, h] = ds @ own.r[rows, h]
      dr[rows, h] += np.outer(ds, own.far[b, i, h])
    ds = ds * counts
    dq[b, i, h] = ds @ own.k[b, js, h]
    dk[b, js, h] += np.outer(ds, own.q[b, i, h])
  return out, grads


def attend(case: Case, own: Given, **options: Any) -> Any:
  """The op as a function of q, k, v, and those of the relative terms."""

  def function(q, k, v, far, r):
    return blockwise_attention(
      q,
      k,
      v,
      own.sight,
      mask=own.mask,
      relative=Relative(far, r) if case.relative else None,
      drop=Drop(KEY, case.rate) if case.rate else None,
      **({"size": case.size} | case.options | options),
    )

  return function


def both(function: Any, slope: Any, *args: Any) -> tuple[Any, list[Any]]:
  """The output and the gradients."""

  @jit
  def run(*args):
    out, back = jax.vjp(function, *args)
    return out, back(jnp.asarray(slope, out.dtype))

  out, grads = run(*args)
  return np.asarray(out), [np.asarray(x) for x in grads]


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(name):
  case = CASES[name]
  own = given(case)
  want, wanted = reference(case, own)
  with precision("float64"):
    got, grads = both(attend(case, own), own.slope, *own[:5])
  # Worst error measured on CPU: TODO
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  for a, b in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
  with precision("float32"):
    args = [jnp.asarray(x, jnp.float32) for x in own[:5]]
    got, grads = both(attend(case, own), own.slope, *args)
  assert got.dtype == jnp.float32
  # Worst error measured on CPU: TODO
  np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)
  for a, b in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)
