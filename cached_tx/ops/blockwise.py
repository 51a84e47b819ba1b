"""Exact softmax attention by blocks of queries and keys.

Rabe and Staats, 2021, arXiv:2112.05682, and Dao et al., 2022, arXiv:2205.14135: the
maximum, the sum and the mean of values of a query are carried over the blocks of keys,
and what came before is scaled by exp(old maximum - new maximum) (the latter's section
3.1). Scores of Q x S are never held: backward, those of a block are computed again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cached_tx.ops.attention import softmax_attention
from cached_tx.ops.bits import Drop, Words, kept, words
from cached_tx.ops.positions import distance_scores
from cached_tx.ops.sight import (
  EVERYTHING,
  Grid,
  Hidden,
  Range,
  Sight,
  block,
  bounds,
  hidden,
  padded,
  ranges,
  seen,
)

Queries = Float[Array, "B Q H K"]
Keys = Float[Array, "B S H K"]
Block = Float[Array, "H B n K"]
Scores = Float[Array, "H B n s"]

DENSE = 2**15  # up to so many scores of a head are held
LIBRARY = 2**28  # up to so many scores of all heads a GPU may hold
KERNELS = (None, "blocks", "dense", "xla", "cudnn")


class Relative(NamedTuple):
  """Terms of Transformer-XL that depend on distance, as of `distance_scores`.

  Attributes:
    q: queries with the bias v, scaled.
    r: of the distances W - 1 to 0, as of `distance_table`.
  """

  q: Queries
  r: Float[Array, "W H K"]


class _Plan(NamedTuple):
  """What is known before anything is traced."""

  grid: Grid
  ranges: tuple[Range, ...]
  rate: float  # of dropout


class _Fixed(NamedTuple):
  """What no gradient flows to."""

  hidden: Hidden
  fate: Words | None  # of the weights that may be dropped
  bounds: Array  # the plan's ranges, or less


class _Terms(NamedTuple):
  """`Relative`, led by heads."""

  q: Float[Array, "H B Q K"]
  r: Float[Array, "H W K"]  # see `_first`


def blockwise_attention(
  q: Queries,
  k: Keys,
  v: Keys,
  sight: Sight = EVERYTHING,
  *,
  causal: bool = True,
  window: int = 0,
  offset: int | None = None,
  mask: Bool[Array, "B #Q S"] | None = None,
  relative: Relative | None = None,
  drop: Drop | None = None,
  size: tuple[int, int] | None = None,
  kernel: str | None = None,
) -> Queries:
  """softmax(q k^T + relative terms) v over the keys that each query sees.

  Memory grows with Q + S, besides what is given. Blocks of keys that no query of a
  block sees are left out: later ones, those outside the window and, as far as the
  least and the largest id of a block tell, those of other documents.

  Args:
    q: any float dtype, already scaled by K ** -0.5.
    k, v: any float dtype. What they hold where no query sees them is of no effect;
      what some queries of a block see and others do not must be finite.
    sight: documents, validity and places, by query and by key.
    causal: a query sees no key whose place is after its own.
    window: how many places a query sees, with its own; 0: any number.
    offset: place of the first query, of the first key being 0; None: the queries
      stand at the last Q of S places.
    mask: hides more keys.
    relative: terms by distance, 0 for later keys.
    drop: of the weights.
    size: how many queries and keys a block has; None: chosen. It changes rounding,
      speed and memory; not which weights are dropped.
    kernel: "blocks"; "dense", `softmax_attention`, which holds all scores; "xla" or
      "cudnn", `jax.nn.dot_product_attention`, which has neither relative terms nor
      dropout, zeros or float64. None: on a GPU JAX's choice of these two, where it
      serves and there are at most 2**28 scores; else, if no size is given, dense for
      at most 2**15 scores of a head on a CPU, where blocks were measured to be faster
      above, and for at most 2**28 scores elsewhere; else blocks.

  Returns:
    The mean of v under the weights, in the dtype of v; 0 where a query sees no key.
    Computed in float32 at least. Gradients flow to q, k, v and `relative`, in reverse
    mode alone.

  Raises:
    ValueError: the arguments do not fit each other.
  """
  B, Q, H, _ = q.shape
  S = k.shape[1]
  rate = 0.0 if drop is None else drop.rate
  if mask is not None and mask.shape[1] == 1:
    valid = mask[:, 0] if sight.key_valid is None else mask[:, 0] & sight.key_valid
    sight, mask = sight._replace(key_valid=valid), None
  rows, columns = size or _size(Q, S, relative is not None)
  rows, columns = min(rows, Q), min(columns, S)
  at = S - Q if offset is None else offset
  grid = Grid(Q, S, rows, columns, at, causal, window)
  _check(grid, sight, offset, relative, rate, kernel)
  exact = jnp.promote_types(q.dtype, jnp.float32) == jnp.float32
  serves = exact and relative is None and not rate and sight.zeros is None
  few = B * H * Q * S <= LIBRARY
  if kernel is None and serves and few and jax.default_backend() == "gpu":
    return _library(grid, q, k, v, sight, mask, None)
  if kernel is None and size is None and (Q * S <= DENSE or (few and not _on_cpu())):
    kernel = "dense"
  if kernel == "dense":
    return _dense(grid, q, k, v, sight, mask, relative, drop)
  if kernel in ("xla", "cudnn"):
    if not serves:
      raise ValueError(
        f"kernel {kernel!r} has no relative terms, no dropout, no zeros and no "
        "float64: use 'blocks'"
      )
    return _library(grid, q, k, v, sight, mask, kernel)
  own = hidden(grid, sight, mask)
  known = ranges(grid, own)
  leading = lambda x, n: padded(jnp.transpose(x, (2, 0, 1, 3)), n, 2)
  fate = None
  if drop is not None and rate:
    fate = words(drop.key, (H, B, Q), S)
    fate = Words(padded(fate.rows, rows, 2), padded(fate.columns, columns, 0))
  terms = None
  if relative is not None:
    terms = _Terms(leading(relative.q, rows), _rows(grid, relative.r))
  out = _attend(
    _Plan(grid, known, rate),
    leading(q, rows),
    leading(k, columns),
    leading(v, columns),
    terms,
    _Fixed(own, fate, bounds(grid, known, own)),
  )
  return jnp.transpose(out, (1, 2, 0, 3))[:, :Q]


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def _size(Q: int, S: int, relative: bool) -> tuple[int, int]:
  """Queries and keys of a block, as measured on a CPU with heads of 64 channels.

  Terms by distance are of n + s distances for blocks of n x s: few queries waste less.
  """
  if Q * S <= DENSE:
    return Q, S
  if not _on_cpu():  # chosen for large products; not measured
    return 512, 512
  if relative:
    return 64, 128
  return (256, 256) if max(Q, S) >= 1024 else (128, 128)


def _check(
  grid: Grid,
  sight: Sight,
  offset: int | None,
  relative: Relative | None,
  rate: float,
  kernel: str | None,
) -> None:
  """Raises ValueError where arguments do not fit each other."""
  if min(grid.rows, grid.columns) < 1 or grid.window < 0 or grid.offset < 0:
    raise ValueError(
      f"blocks of {grid.rows} x {grid.columns}, a window of {grid.window}, an offset "
      f"of {grid.offset}: a block has queries and keys, nothing is negative, and more "
      "queries than keys need an offset of their own"
    )
  if (sight.query_documents is None) != (sight.key_documents is None):
    raise ValueError("sight has documents of queries or of keys alone: give both")
  if sight.placed and (relative is not None or offset is not None):
    raise ValueError(
      "sight has places, but relative terms and an offset are of queries and keys that "
      "stand one after the other: leave the places out"
    )
  if relative is not None and len(relative.r) < grid.offset + grid.queries:
    raise ValueError(
      f"relative.r has {len(relative.r)} distances; the last query is at distance "
      f"{grid.offset + grid.queries - 1} from the first key"
    )
  if not 0 <= rate < 1:
    raise ValueError(f"drop.rate is {rate}; it must be at least 0 and below 1")
  if kernel not in KERNELS:
    raise ValueError(f"kernel is {kernel!r}; it must be one of {KERNELS}")


class _Clean(NamedTuple):
  """What is attended, with 0 for queries that see nothing and keys that nobody sees."""

  q: Queries
  k: Keys
  v: Keys
  shown: Bool[Array, "B Q S"]
  zeros: Bool[Array, "#B Q S"] | None
  sees: Bool[Array, "B Q 1 1"]


def _cleaned(grid: Grid, q: Queries, k: Keys, v: Keys, own: Hidden) -> _Clean:
  grid = grid._replace(rows=grid.queries, columns=grid.keys)
  shown, zeros = seen(grid, own, 0, 0)
  shown = jnp.broadcast_to(shown, (len(q), *shown.shape[1:]))
  used = (shown if zeros is None else shown & ~zeros).any(axis=1)[..., None, None]
  sees = shown.any(axis=2)[..., None, None]
  k, v = jnp.where(used, k, 0), jnp.where(used, v, 0)  # 0 times NaN would be NaN
  return _Clean(jnp.where(sees, q, 0), k, v, shown, zeros, sees)


def _dense(
  grid: Grid,
  q: Queries,
  k: Keys,
  v: Keys,
  sight: Sight,
  mask: Any,
  relative: Relative | None,
  drop: Drop | None,
) -> Queries:
  """The same with all scores at once."""
  own = _cleaned(grid, q, k, v, Hidden(sight, mask))
  scores = dropout = None
  if relative is not None:
    far = grid.offset + grid.queries
    # Up to the distance of the last query, then 0 for later keys.
    r = relative.r[len(relative.r) - far :]
    r = jnp.pad(r, ((0, max(0, grid.keys - far)), (0, 0), (0, 0)))
    scores = distance_scores(jnp.where(own.sees, relative.q, 0), r, None, grid.keys)
  if drop is not None and drop.rate:
    B, Q, H, _ = q.shape
    stays = jnp.swapaxes(kept(words(drop.key, (H, B, Q), grid.keys), drop.rate), 0, 1)
    rest = 1 - drop.rate
    dropout = lambda weights: jnp.where(stays, weights / rest, 0)
  out = softmax_attention(own.q, own.k, own.v, own.shown, scores, dropout, own.zeros)
  return jnp.where(own.sees, out, 0)


def _library(
  grid: Grid, q: Queries, k: Keys, v: Keys, sight: Sight, mask: Any, kernel: Any
) -> Queries:
  """JAX's own attention; whether it holds all scores depends on the kernel."""
  attend = partial(jax.nn.dot_product_attention, scale=1.0, implementation=kernel)
  if not grid.window and mask is None and all(x is None for x in sight):
    if not grid.causal:
      return attend(q, k, v)
    if grid.queries == grid.keys and not grid.offset:
      return attend(q, k, v, is_causal=True)
  own = _cleaned(grid, q, k, v, Hidden(sight, mask))
  out = attend(own.q, own.k, own.v, mask=own.shown[:, None])
  return jnp.where(own.sees, out, 0)


def _rows(grid: Grid, r: Float[Array, "W H K"]) -> Float[Array, "H W2 K"]:
  """r, from the largest distance of any block on; 0 where there is no such distance."""
  front = grid.offset + grid.high * grid.rows - len(r)
  back = max(0, grid.wide * grid.columns - grid.offset)
  r = jnp.swapaxes(r, 0, 1)[:, max(0, -front) :]
  return jnp.pad(r, ((0, 0), (max(0, front), back), (0, 0)))


def _first(grid: Grid, i: Any, j: Any) -> Any:
  """Which row of `_Terms.r` has the largest distance of blocks i and j."""
  return (grid.high - 1 - i) * grid.rows + j * grid.columns


def _reach(grid: Grid) -> int:
  """Of how many distances two blocks are; if all is one block, of those from 0 on."""
  most = grid.rows + grid.columns
  return min(most, grid.offset + grid.rows) if grid.high == grid.wide == 1 else most


def by_key(scores: Float[Array, "H B n w"], keys: int) -> Scores:
  """Turns scores by distance, w = n + s, into scores by key.

  Column c of query a is at distance a - (c - n + 1) from the block's first key.
  """
  *batch, n, w = scores.shape

  def slices(x):
    take = lambda row, begin: jax.lax.dynamic_slice_in_dim(row, begin, keys, axis=-1)
    return jax.vmap(take, in_axes=(-2, 0), out_axes=-2)(x, n - 1 - jnp.arange(n))

  def flat(x):
    x = x.reshape(*batch, n * w)[..., n - 1 : n - 1 + n * (w - 1)]
    return x.reshape(*batch, n, w - 1)[..., :keys]

  return jax.lax.platform_dependent(scores, cpu=slices, default=flat)


def by_distance(slopes: Scores) -> Float[Array, "H B n w"]:
  """The way of gradients: turns what is by key into what is by distance."""
  *batch, n, s = slopes.shape

  def rows(x):
    def put(a, out):
      row = jax.lax.dynamic_slice_in_dim(x, a, 1, axis=-2)
      begin = (0,) * len(batch) + (a, n - 1 - a)
      return jax.lax.dynamic_update_slice(out, row, begin)

    return jax.lax.fori_loop(0, n, put, jnp.zeros((*batch, n, n + s), x.dtype))

  def flat(x):
    by_row = [(0, 0)] * len(batch)
    x = jnp.pad(x, [*by_row, (0, 0), (0, n - 1)]).reshape(*batch, n * (n + s - 1))
    return jnp.pad(x, [*by_row, (n - 1, 1)]).reshape(*batch, n, n + s)

  return jax.lax.platform_dependent(slopes, cpu=rows, default=flat)


class _Pair(NamedTuple):
  """A block of keys, and what a block of queries makes of it."""

  logits: Scores
  keys: Block
  values: Block
  r: Any  # rows of the distances between them
  zeros: Any  # which keys count as zeros


def _pair(
  plan: _Plan, q: Block, k, v, terms, fixed: _Fixed, i: Any, j: Any, masked: bool
) -> _Pair:
  """Of queries `q`, which are block i, and block j of keys."""
  grid = plan.grid
  k, v = (block(x, j, grid.columns, 2) for x in (k, v))
  shown = zeros = r = None
  if masked:
    shown, zeros = seen(grid, fixed.hidden, i, j)
    used = shown if zeros is None else shown & ~zeros
    used = used.any(axis=1)[None, :, :, None]
    k, v = jnp.where(used, k, 0), jnp.where(used, v, 0)  # 0 times NaN would be NaN
  dot = _dot(q)
  logits = dot("hbnk,hbsk->hbns", q, k)
  if zeros is not None:
    logits = jnp.where(zeros[None], 0, logits)
  if terms is not None:
    width = _reach(grid)
    r = jax.lax.dynamic_slice_in_dim(terms.r, _first(grid, i, j), width, axis=1)
    far = dot("hbnk,hwk->hbnw", block(terms.q, i, grid.rows, 2), r)
    later = grid.rows + grid.columns - width
    far = jnp.pad(far, ((0, 0), (0, 0), (0, 0), (0, later)))
    logits = logits + by_key(far, grid.columns)
  if shown is not None:
    logits = jnp.where(shown[None], logits, -jnp.inf)
  return _Pair(logits, k, v, r, zeros)


def _dot(x: Array) -> Any:
  """Products accumulated in float32 at least."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return partial(jnp.einsum, preferred_element_type=wide)


def _without(pair: _Pair, plan: _Plan, fixed: _Fixed, i: Any, j: Any) -> tuple:
  """What sets to 0 the weights of keys that count as zeros, and those that drop."""
  count = drop = lambda x: x
  if pair.zeros is not None:
    zeros = pair.zeros[None]
    count = lambda x: jnp.where(zeros, 0, x)
  if fixed.fate is not None:
    rows, columns = fixed.fate
    grid = plan.grid
    own = Words(block(rows, i, grid.rows, 2), block(columns, j, grid.columns, 0))
    stays = kept(own, plan.rate)
    drop = lambda x: jnp.where(stays, x, 0)
  return count, drop


def _over_keys(plan: _Plan, bounds: Any, step: Any, carry: Any) -> Any:
  """Calls `step` for the blocks of keys that a block of queries sees, in order."""
  table = np.asarray(plan.ranges)
  for n, masked in enumerate((True, False, True)):
    if (table[:, n] == table[:, n + 1]).all():
      continue
    own = partial(step, masked=masked)
    if plan.grid.wide == 1 and len(table) == 1:
      carry = own(0, carry)
    else:
      carry = jax.lax.fori_loop(bounds[n], bounds[n + 1], own, carry)
  return carry


def _over_queries(plan: _Plan, fixed: _Fixed, step: Any, carry: Any) -> Any:
  """Calls `step` for every block of queries; joins what it returns, H B Q ...."""
  if plan.grid.high == 1:
    return step(carry, (0, fixed.bounds[0]))
  carry, made = jax.lax.scan(step, carry, (jnp.arange(plan.grid.high), fixed.bounds))

  def joined(x):  # blocks H B n K
    blocks, H, B, n, K = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(H, B, blocks * n, K)

  return carry, jax.tree.map(joined, made)


def _forward(plan: _Plan, q, k, v, terms, fixed: _Fixed):
  """The output, the largest logit of each query, and 1 / the sum relative to it."""
  dot, rows = _dot(q), plan.grid.rows
  H, B, _, K = q.shape

  def queries(_, now):
    i, bounds = now
    own = block(q, i, rows, 2)

    def keys(j, carry, masked):
      top, total, mean = carry
      pair = _pair(plan, own, k, v, terms, fixed, i, j, masked)
      new = jnp.maximum(top, pair.logits.max(axis=-1, keepdims=True))
      finite = jnp.where(new == -jnp.inf, 0, new) if masked else new
      weights = jnp.exp(pair.logits - finite)
      fade = jnp.exp(top - finite)
      total = total * fade + weights.sum(axis=-1, keepdims=True)
      count, drop = _without(pair, plan, fixed, i, j)
      given = drop(count(weights)).astype(v.dtype)
      return new, total, mean * fade + dot("hbns,hbsk->hbnk", given, pair.values)

    wide = jnp.promote_types(q.dtype, jnp.float32)
    empty = jnp.zeros((H, B, rows, 1), wide)
    start = (empty - jnp.inf, empty, jnp.zeros((H, B, rows, K), wide))
    top, total, mean = _over_keys(plan, bounds, keys, start)
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    out = mean * (share / (1 - plan.rate))
    return None, (out.astype(v.dtype), top, share)

  return _over_queries(plan, fixed, queries, None)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, terms, fixed: _Fixed):
  return _forward(plan, q, k, v, terms, fixed)[0]


def _saved(plan: _Plan, q, k, v, terms, fixed: _Fixed):
  out, top, share = _forward(plan, q, k, v, terms, fixed)
  return out, (q, k, v, terms, fixed, out, top, share)


def _gradients(plan: _Plan, saved, slope):
  """Dao et al., algorithm 4, block by block of queries."""
  q, k, v, terms, fixed, out, top, share = saved
  grid, dot = plan.grid, _dot(q)
  turned = lambda x: jnp.swapaxes(x, -1, -2)
  clean = lambda x: jnp.where(share > 0, x, 0)  # of what sees nothing nothing is left
  q, top, slope = clean(q), clean(top), clean(slope * share)
  if terms is not None:
    terms = terms._replace(q=clean(terms.q))
  along = (slope * out).sum(axis=-1, keepdims=True)  # H B Q 1
  slope = (slope / (1 - plan.rate)).astype(v.dtype)
  zeros = lambda x: jnp.zeros(x.shape, top.dtype)

  def queries(carry, now):
    i, bounds = now
    parts = (block(x, i, grid.rows, 2) for x in (q, slope, along, top))
    own, above, below, high = parts
    # Products along the first axis of both factors are slow on a CPU; these are not.
    own_t, above_t = turned(own), turned(above)
    far_q = terms and block(terms.q, i, grid.rows, 2)

    def keys(j, carry, masked):
      dq, dk, dv, far_dq, dr = carry
      pair = _pair(plan, own, k, v, terms, fixed, i, j, masked)
      weights = jnp.exp(pair.logits - high)
      count, drop = _without(pair, plan, fixed, i, j)
      given = drop(count(weights)).astype(v.dtype)
      dv = _add(dv, dot("hbkn,hbns->hbks", above_t, given), j * grid.columns)
      grad = drop(count(dot("hbnk,hbsk->hbns", above, pair.values)))
      grad = weights * (grad - below)
      if terms is not None:
        far = by_distance(grad.astype(k.dtype))[..., : _reach(grid)]
        far_dq = far_dq + dot("hbnw,hwk->hbnk", far, pair.r)
        part = dot("hkbn,hbnw->hkw", jnp.moveaxis(far_q, 3, 1), far)
        dr = _add(dr, part, _first(grid, i, j))
      grad = count(grad).astype(k.dtype)
      dq = dq + dot("hbns,hbsk->hbnk", grad, pair.keys)
      dk = _add(dk, dot("hbkn,hbns->hbks", own_t, grad), j * grid.columns)
      return dq, dk, dv, far_dq, dr

    dk, dv, dr = carry
    start = (zeros(own), dk, dv, terms and zeros(own), dr)
    dq, dk, dv, far_dq, dr = _over_keys(plan, bounds, keys, start)
    return (dk, dv, dr), (dq, far_dq)

  start = (zeros(turned(k)), zeros(turned(v)), terms and zeros(turned(terms.r)))
  (dk, dv, dr), (dq, far_dq) = _over_queries(plan, fixed, queries, start)
  like = lambda x, own: x.astype(own.dtype)
  if terms is not None:
    terms = _Terms(like(far_dq, terms.q), like(turned(dr), terms.r))
  return like(dq, q), like(turned(dk), k), like(turned(dv), v), terms, None


def _add(x: Array, part: Array, begin: Any) -> Array:
  """Adds `part` to the last axis of `x`, from `begin` on."""
  n = part.shape[-1]
  if x.shape[-1] == n:
    return x + part
  now = jax.lax.dynamic_slice_in_dim(x, begin, n, axis=-1)
  return jax.lax.dynamic_update_slice_in_dim(x, now + part, begin, axis=-1)


_attend.defvjp(_saved, _gradients)
