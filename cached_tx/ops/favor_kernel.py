"""Causal FAVOR+ with positive features as one kernel, forward and backward.

The mathematics is that of ops/sums.py. A program goes over the chunks of one row and
head in turn, the sums being its carry, and makes features where they are used: none of
the R numbers per token is written to memory. Three loops are needed: forward; forward
again for the cotangents of queries, which need the sums before; backward for those of
keys and values, which need the cotangent of the sums after. None keeps sums by chunk.

One step per loop serves two ways to run it. On a GPU (Triton) a program is a loop over
chunks; on a TPU (Mosaic) chunks are the last axis of the grid, and the sums an output
that stays in place. All arrays of a step have two axes, and there are no cumulative
sums, slices or concatenations in it, which one or the other cannot do.

Compiled for both, and run on neither yet: see docs/performers.md.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cached_tx.ops.features import FEATURES, FeatureMap
from cached_tx.ops.projections import Rows
from cached_tx.ops.sums import EMPTY, FLOOR, PrefixSums, faded
from cached_tx.types import Heads, Segment

# Kinds of devices on which the kernel was seen to be right and faster than the scans.
FASTER: frozenset[str] = frozenset()
PLATFORMS = ("gpu", "tpu")
SMALLEST = 16  # of the sides of a product on a GPU
WARPS = 8  # of 32 threads: the sums of R K = 16,384 are 64 registers of each


def chosen(device_kind: str) -> bool:
  """Whether the kernel is taken unasked on such a device."""
  return device_kind in FASTER


def misfit(
  features: FeatureMap, w: Rows | None, chunk: int, width: int, values: int
) -> str | None:
  """Why the kernel cannot do this, if it cannot.

  Args:
    features, w, chunk: as of `favor_kernel`.
    width: K.
    values: Kv.
  """
  if features != FEATURES["positive"] or w is None:
    return "the kernel makes positive features of a projection, and none other"
  sizes = {"chunk": chunk, "R": w.shape[0], "K": width, "the width of v": values}
  for name, size in sizes.items():
    if size < SMALLEST or size & (size - 1):
      return (
        f"{name} is {size}; the kernel multiplies blocks whose sides are powers of "
        f"two, {SMALLEST} or more"
      )
  return None


def favor_kernel(
  q: Heads,
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  sums: PrefixSums,
  *,
  features: FeatureMap = FEATURES["positive"],
  chunk: int = 64,
  interpret: bool = False,
  platform: str | None = None,
) -> tuple[Float[Array, "B L H Kv"], PrefixSums]:
  """Causal attention as `favor_attention` has it, by a kernel.

  Memory beyond arguments and results is one number per token and head and one per
  chunk and head, besides q, k and v with their axes exchanged on a TPU.

  Args:
    q, k: any float dtype, both already scaled by K ** -0.25. w . q and w . k are
      computed in full float32; where both are bfloat16, by three products with parts
      of w, which sum to it.
    v: any float dtype; sets the dtype of the output. Float32 is multiplied in full
      precision; with coarser values the factors of products, features and sums among
      them, are rounded to their dtype. All is added up in float32.
    w: projection.
    segment: document starts and valid tokens of the L positions.
    sums: sums over the earlier keys of each row's document.
    features: positive ones only.
    chunk: tokens per step. R, K, Kv and it are powers of two, 16 or more; L is any.
    interpret: run by JAX's interpreter of kernels, for tests: slow, on any device, in
      float64 too.
    platform: gpu or tpu, whose way to run the steps is taken. None: where it runs, and
      gpu if interpreted.

  Returns:
    As `favor_attention`, gradients included; second derivatives there are none.

  Raises:
    ValueError: for other features, sizes that do not fit, and sums of other features.
  """
  why = misfit(features, w, chunk, q.shape[-1], v.shape[-1])
  if w is None or why is not None:
    raise ValueError(f"{why}: use the associative form or the scan")
  R = w.shape[0]
  if sums.values.shape[2:] != (R, v.shape[-1]):
    raise ValueError(
      f"sums are of {sums.values.shape[2]} features and values {sums.values.shape[3]} "
      f"wide, but there are {R} features and values {v.shape[-1]} wide"
    )
  if platform is not None and platform not in PLATFORMS:
    raise ValueError(
      f"platform is {platform!r}; one of {', '.join(PLATFORMS)}, or None"
    )
  if interpret and platform is None:
    platform = "gpu"
  dtype = sums.values.dtype
  wide = jnp.promote_types(jnp.result_type(q, k, v), dtype)
  tokens = _Tokens(q, k, v, segment.starts & segment.real, segment.real)
  before = jax.tree.map(lambda x: x.astype(wide), sums)
  before = before._replace(top=jax.lax.stop_gradient(before.top))
  how = _How(chunk, interpret, platform)
  out, after = _causal(how, tokens, jax.lax.stop_gradient(w), before)
  return out, jax.tree.map(lambda x: x.astype(dtype), after)


class _How(NamedTuple):
  """What is known before anything runs."""

  chunk: int
  interpret: bool
  platform: str | None


class _Tokens(NamedTuple):
  """The tokens of a call."""

  q: Float[Array, "B L H K"]
  k: Float[Array, "B L H K"]
  v: Float[Array, "B L H Kv"]
  starts: Bool[Array, "B L"]
  shown: Bool[Array, "B L"]


class _Saved(NamedTuple):
  """What the forward pass leaves besides its arguments and results."""

  below: Float[Array, "B H N 1 C"]  # denominators; infinite where no gradient can go
  tops: Float[Array, "B H N 1 1"]  # mu before every chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(
  how: _How, tokens: _Tokens, w: Rows, sums: PrefixSums
) -> tuple[Array, PrefixSums]:
  out, after, _ = _forward(how, tokens, w, sums)
  return out, after


def _causal_forward(how, tokens, w, sums):
  out, after, saved = _forward(how, tokens, w, sums)
  return (out, after), (tokens, w, sums, out, saved)


def _causal_backward(how, kept, cotangents):
  tokens, w, sums, out, saved = kept
  slope, after = cotangents
  q, k, v, values, keys = _backward(how, tokens, w, sums, out, saved, slope, after)
  flags: Any = [np.zeros(x.shape, jax.dtypes.float0) for x in tokens[3:]]
  before = PrefixSums(values, keys, jnp.zeros_like(sums.top))
  return _Tokens(q, k, v, *flags), jnp.zeros_like(w), before


_causal.defvjp(_causal_forward, _causal_backward)


def _forward(
  how: _How, tokens: _Tokens, w: Rows, sums: PrefixSums
) -> tuple[Array, PrefixSums, _Saved]:
  B, L, H, _ = tokens.v.shape
  wide = sums.values.dtype
  step = functools.partial(_attend, _products(tokens), wide)

  def run(platform, tokens, w, sums):
    lay = _Lay(platform, how.chunk, L)
    given = [*(lay.heads(x) for x in tokens[:3]), lay.codes(tokens)]
    made = [
      lay.empty_heads(tokens.v.shape, tokens.v.dtype),
      _Laid("bhn1c", jax.ShapeDtypeStruct((B, H, lay.chunks, 1, how.chunk), wide)),
      _Laid("bhn11", jax.ShapeDtypeStruct((B, H, lay.chunks, 1, 1), wide)),
    ]
    (out, below, tops), ends = _over_chunks(
      how, platform, step, given, _parts(tokens, w, wide), _carry(sums), made
    )
    after = PrefixSums(ends[0], ends[1][:, :, 0], ends[2][:, :, 0, 0])
    return lay.joined(out), after, _Saved(below, tops)

  return _by_platform(how, run, tokens, w, sums)


def _backward(
  how: _How,
  tokens: _Tokens,
  w: Rows,
  sums: PrefixSums,
  out: Array,
  saved: _Saved,
  slope: Array,
  after: PrefixSums,
) -> tuple[Array, ...]:
  """Cotangents of q, k, v, and of the sums' values and keys."""
  L = tokens.q.shape[1]
  wide = sums.values.dtype
  products = _products(tokens)

  def run(platform, tokens, w, sums, out, saved, slope, after):
    lay = _Lay(platform, how.chunk, L)
    given = [*(lay.heads(x) for x in tokens[:3]), lay.codes(tokens)]
    given += [_Laid("bhn11", saved.tops), _Laid("bhn1c", saved.below)]
    given += [lay.heads(slope), lay.heads(out)]
    rows = _parts(tokens, w, wide)
    empty = lambda x: lay.empty_heads(x.shape, x.dtype)
    step = functools.partial(_pull_queries, products, wide)
    (q,), _ = _over_chunks(
      how, platform, step, given, rows, _carry(sums)[:2], [empty(tokens.q)]
    )
    step = functools.partial(_pull_keys, products, wide)
    made = [empty(tokens.k), empty(tokens.v)]
    (k, v), ends = _over_chunks(
      how, platform, step, given, rows, _carry(after)[:2], made, reverse=True
    )
    return *map(lay.joined, (q, k, v)), ends[0], ends[1][:, :, 0]

  return _by_platform(how, run, tokens, w, sums, out, saved, slope, after)


# The steps: one chunk of one row and head. All arrays have two axes.


class _Weights(NamedTuple):
  """`Weights` of ops/sums.py, and those of the last token by key."""

  pairs: Float[Array, "C C"]
  older: Float[Array, "C 1"]
  late: Float[Array, "C 1"]  # the last row of `pairs`
  decay: Float[Array, "1 1"]  # the last number of `older`
  top: Float[Array, "1 1"]  # mu after the chunk


class _Products(NamedTuple):
  """How factors are rounded before they are multiplied."""

  coarse: Any  # dtype; None: not at all

  def __call__(self, a: Array, b: Array, sides: tuple[int, int]) -> Array:
    """Sums over one axis of each."""
    exact = self.coarse is None
    a, b = (a, b) if exact else (a.astype(self.coarse), b.astype(self.coarse))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jax.lax.dot_general(
      a,
      b,
      (((sides[0],), (sides[1],)), ((), ())),
      precision=precision,
      preferred_element_type=wide,
    )


def _products(tokens: _Tokens) -> _Products:
  coarse = tokens.v.dtype.itemsize < 4
  return _Products(tokens.v.dtype if coarse else None)


def _attend(products, wide, given, rows, sums):
  """The output of a chunk, its denominators and mu before; the sums after it."""
  q, k, v, codes = given
  values, keys, top = sums
  shown = _column(codes) >= 0
  q, _ = _features(_shown(q, shown, wide), rows)
  k, scale = _features(_shown(k, shown, wide), rows)
  dtype, v = v.dtype, _shown(v, shown, wide)
  weights = _weigh(scale, codes, top)

  own = faded(weights.pairs, products(q, k, (1, 1)))  # C C
  above = products(own, v, (1, 0)) + faded(weights.older, products(q, values, (1, 0)))
  asked = (q * keys).sum(axis=1, keepdims=True)
  below = own.sum(axis=1, keepdims=True) + faded(weights.older, asked)
  none = jnp.abs(below) <= FLOOR  # not so for NaN, which is to be seen
  out = jnp.where(none, 0, above / jnp.where(none, 1, below))
  out = jnp.where(shown, out, 0).astype(dtype)
  below = jnp.where(none | (below != below), jnp.inf, below)
  made = out, _row(below), top
  return made, (*_extended(products, k, v, weights, values, keys), weights.top)


def _pull_queries(products, wide, given, rows, sums):
  """The cotangent of a chunk's q; the sums after it."""
  q, k, v, codes, top, below, slope, out = given
  values, keys = sums
  shown = _column(codes) >= 0
  dtype, q = q.dtype, _shown(q, shown, wide)
  mapped, _ = _features(q, rows)
  k, scale = _features(_shown(k, shown, wide), rows)
  v = _shown(v, shown, wide)
  weights = _weigh(scale, codes, top)

  ahead, own = _divided_slope(slope, out, below, shown, wide)
  pairs = faded(weights.pairs, products(ahead, v, (1, 1)) + own)
  older = faded(weights.older, products(ahead, values, (1, 1)) + own * keys)  # C R
  found = _pulled(products, products(pairs, k, (1, 0)) + older, mapped, q, rows)
  found = jnp.where(shown, found, 0).astype(dtype)
  return (found,), _extended(products, k, v, weights, values, keys)


def _pull_keys(products, wide, given, rows, after):
  """The cotangents of a chunk's k and v; that of the sums before it."""
  q, k, v, codes, top, below, slope, out = given
  values, keys = after
  shown = _column(codes) >= 0
  q, _ = _features(_shown(q, shown, wide), rows)
  dtypes, k, v = (k.dtype, v.dtype), *(_shown(x, shown, wide) for x in (k, v))
  mapped, scale = _features(k, rows)
  weights = _weigh(scale, codes, top)

  ahead, own = _divided_slope(slope, out, below, shown, wide)
  pairs = faded(weights.pairs, products(ahead, v, (1, 1)) + own)
  own_pairs = faded(weights.pairs, products(q, mapped, (1, 1)))
  by_keys = products(v, values, (1, 1)) + keys  # C R
  slope_k = products(pairs, q, (0, 0)) + faded(weights.late, by_keys)
  slope_k = _pulled(products, slope_k, mapped, k, rows)
  by_values = faded(weights.late, products(mapped, values, (1, 0)))
  slope_v = products(own_pairs, ahead, (0, 0)) + by_values
  found = tuple(
    jnp.where(shown, x, 0).astype(dtype)
    for x, dtype in zip((slope_k, slope_v), dtypes, strict=True)
  )

  asked = products(q, faded(weights.older, ahead), (0, 0))
  asked_keys = (q * faded(weights.older, own)).sum(axis=0, keepdims=True)
  values = asked + faded(weights.decay, values)
  return found, (values, asked_keys + faded(weights.decay, keys))


def _extended(products, k, v, weights, values, keys):
  """The sums after a chunk."""
  late = k * weights.late
  values = faded(weights.decay, values) + products(late, v, (0, 0))
  keys = faded(weights.decay, keys) + late.sum(axis=0, keepdims=True)
  return values, keys


def _shown(x: Array, shown: Array, wide: Any) -> Array:
  return jnp.where(shown, x.astype(wide), 0)


def _features(x: Float[Array, "C K"], rows: Any) -> tuple[Array, Array]:
  """Values C R and scale C 1 of positive features."""
  found: Any = 0
  for n in reversed(range(rows.shape[0])):  # the smallest part first
    part = rows[n]
    exact = None if part.dtype == x.dtype else part.dtype
    found = found + _Products(exact)(x, part, (1, 1))
  top = found.max(axis=1, keepdims=True)
  half = (x * x).sum(axis=1, keepdims=True) / 2
  return jnp.exp(found - top), top - half - math.log(found.shape[1]) / 2


def _pulled(products: _Products, slope: Array, values: Array, x: Array, rows: Any):
  """Cotangent of x by that of its features."""
  slope = slope * values
  return products(slope, rows[0], (1, 0)) - slope.sum(axis=1, keepdims=True) * x


def _weigh(scale: Array, codes: Array, top: Array) -> _Weights:
  """The weights of a chunk.

  Args:
    scale: g of its keys (C 1).
    codes: documents begun so far in the chunk; of tokens that are not real, -1 less
      that (1 C).
    top: mu before the chunk (1 1).
  """
  begun = jnp.where(codes < 0, -1 - codes, codes)
  column, scales = _column(begun), _row(scale)
  earlier = _places(codes.shape[1], 1) <= _places(codes.shape[1], 0)
  seen = (column == begun) & earlier & (codes >= 0)
  own = jnp.where(seen, scales, EMPTY).max(axis=1, keepdims=True)
  fresh = column > 0
  mu = jnp.where(fresh, own, jnp.maximum(own, top))
  pairs = jnp.where(seen, jnp.exp(jnp.minimum(scales - mu, 0)), 0)
  older = jnp.where(fresh, 0, jnp.exp(jnp.minimum(top - mu, 0)))

  last = begun.max(axis=1, keepdims=True)
  seen = (column == last) & (_column(codes) >= 0)
  own = jnp.where(seen, scale, EMPTY).max(axis=0, keepdims=True)
  mu = jnp.where(last > 0, own, jnp.maximum(own, top))
  late = jnp.where(seen, jnp.exp(jnp.minimum(scale - mu, 0)), 0)
  decay = jnp.where(last > 0, 0, jnp.exp(jnp.minimum(top - mu, 0)))
  return _Weights(pairs, older, late, decay, mu)


def _divided_slope(slope, out, below, shown, wide):
  """Cotangents of numerators (C Kv) and denominators (C 1).

  Where no gradient comes from, none goes, even if the output is no number.
  """
  ahead = _shown(slope, shown, wide)
  ahead = jnp.where(ahead == 0, 0, ahead / _column(below))
  own = jnp.where(ahead == 0, 0, ahead * out.astype(wide))
  return ahead, -own.sum(axis=1, keepdims=True)


def _places(size: int, axis: int) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)


def _column(x: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
  """Turned by the diagonal of a square: neither platform exchanges such axes."""
  same = _places(x.shape[1], 0) == _places(x.shape[1], 1)
  return jnp.where(same, x, 0).sum(axis=1, keepdims=True)


def _row(x: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
  same = _places(x.shape[0], 0) == _places(x.shape[0], 1)
  return jnp.where(same, x, 0).sum(axis=0, keepdims=True)


# How steps are run.


class _Laid(NamedTuple):
  """An array, with a letter for each axis: b, h and n are taken one by one."""

  axes: str
  array: Any  # or its shape


class _Lay(NamedTuple):
  """How tokens lie in memory, cut into chunks."""

  platform: str
  chunk: int
  length: int

  @property
  def chunks(self) -> int:
    """N."""
    return -(-self.length // self.chunk)

  @property
  def behind(self) -> int:
    """Tokens of padding after the last one."""
    return self.chunks * self.chunk - self.length

  def heads(self, x: Array) -> _Laid:
    """Of B L H K. A TPU wants tokens and width side by side."""
    if self.behind:
      x = jnp.pad(x, ((0, 0), (0, self.behind), (0, 0), (0, 0)))
    B, _, H, K = x.shape
    if self.platform == "gpu":
      return _Laid("bnchk", x.reshape(B, self.chunks, self.chunk, H, K))
    return _Laid(
      "bhnck", jnp.moveaxis(x, 2, 1).reshape(B, H, self.chunks, self.chunk, K)
    )

  def empty_heads(self, shape: Sequence[int], dtype: Any) -> _Laid:
    """The shape of what `heads` makes of such an array."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    found = jax.eval_shape(lambda x: self.heads(x).array, x)
    return _Laid("bnchk" if self.platform == "gpu" else "bhnck", found)

  def joined(self, x: Array) -> Array:
    """B L H K again."""
    if self.platform == "gpu":
      x = x.reshape(x.shape[0], -1, *x.shape[3:])
    else:
      x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 1, 2)
    return x[:, : self.length]

  def codes(self, tokens: _Tokens) -> _Laid:
    """See `_weigh`. In float32, which holds them exactly and which a TPU can sum."""
    B = tokens.starts.shape[0]
    cut = lambda x: jnp.pad(x, ((0, 0), (0, self.behind))).reshape(
      B, self.chunks, 1, self.chunk
    )
    begun = jnp.cumsum(cut(tokens.starts), axis=-1)
    codes = jnp.where(cut(tokens.shown), begun, -1 - begun)
    return _Laid("bn1c", codes.astype(jnp.float32))


def _parts(tokens: _Tokens, w: Rows, wide: Any) -> _Laid:
  """w, or three parts of 8 bits that sum to it: products with bfloat16 are exact."""
  w = w.astype(wide)
  if {tokens.q.dtype, tokens.k.dtype} != {jnp.dtype(jnp.bfloat16)} or wide != "float32":
    return _Laid("prk", w[None])
  parts = []
  for _ in range(3):
    # Not by a cast to bfloat16 and back, which XLA may leave out.
    parts.append(jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7))
    w = w - parts[-1]
  return _Laid("prk", jnp.stack(parts).astype(jnp.bfloat16))


def _carry(sums: PrefixSums) -> list[_Laid]:
  return [
    _Laid("bhrk", sums.values),
    _Laid("bh1r", sums.keys[:, :, None]),
    _Laid("bh11", sums.top[:, :, None, None]),
  ]


def _by_platform(how: _How, run: Callable[..., Any], *args: Any) -> Any:
  if how.platform is not None:
    return run(how.platform, *args)
  # On any other platform JAX says that there is only its interpreter.
  gpu, tpu = (functools.partial(run, platform) for platform in PLATFORMS)
  return jax.lax.platform_dependent(*args, tpu=tpu, default=gpu)


def _over_chunks(
  how: _How,
  platform: str,
  step: Callable[..., Any],
  given: list[_Laid],
  rows: _Laid,
  start: list[_Laid],
  made: list[_Laid],
  reverse: bool = False,
) -> tuple[Sequence[Array], Sequence[Array]]:
  """Runs step(given, rows, carry) -> (made, carry), chunk after chunk.

  Args:
    how: options.
    platform: gpu or tpu.
    step: of one chunk, one row and one head.
    given: what it gets of its chunk.
    rows: what every step gets, not loaded yet.
    start: the first carry.
    made: shapes of what a chunk gives.
    reverse: from the last chunk on.

  Returns:
    What the chunks gave, and the last carry.
  """
  # Here, for importing Pallas takes as long as importing JAX.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as mosaic
  from jax.experimental.pallas import triton

  gpu = platform == "gpu"
  sizes: dict[str, int] = {}
  for laid in (*given, *start):
    sizes |= dict(zip(laid.axes, laid.array.shape, strict=True))
  count = sizes["n"]
  place = lambda n: count - 1 - n if reverse else n

  def spec(laid: _Laid) -> pl.BlockSpec:
    alone = "bh" if gpu else "bhn"
    block = tuple(
      None if axis in alone else size
      for axis, size in zip(laid.axes, laid.array.shape, strict=True)
    )

    def index(b, h, n=0):
      at = {"b": b, "h": h, "n": n if gpu else place(n)}
      return tuple(at.get(axis, 0) for axis in laid.axes)

    return pl.BlockSpec(block, index)

  def parted(refs):
    cuts = np.cumsum([len(given), 1, len(start), len(made)])
    of, (rows,), first, to, last = (
      refs[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)
    )
    return of, rows, first, to, last

  def loop(*refs):
    of, rows, first, to, last = parted(refs)

    def one(n, carry):
      at = place(n)
      found, carry = step([x[at] for x in of], rows, carry)
      for ref, x in zip(to, found, strict=True):
        ref[at] = x
      return carry

    carry = jax.lax.fori_loop(0, count, one, tuple(x[...] for x in first))
    for ref, x in zip(last, carry, strict=True):
      ref[...] = x

  def grid(*refs):
    of, rows, first, to, last = parted(refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
      for ref, x in zip(last, first, strict=True):
        ref[...] = x[...]

    found, carry = step([x[...] for x in of], rows, tuple(x[...] for x in last))
    for ref, x in zip((*to, *last), (*found, *carry), strict=True):
      ref[...] = x

  ends = [
    _Laid(x.axes, jax.ShapeDtypeStruct(x.array.shape, x.array.dtype)) for x in start
  ]
  inputs = [*given, rows, *start]
  params = (
    triton.CompilerParams(num_warps=WARPS, num_stages=1)
    if gpu
    else mosaic.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    )
  )
  found = pl.pallas_call(
    loop if gpu else grid,
    grid=(sizes["b"], sizes["h"]) if gpu else (sizes["b"], sizes["h"], count),
    in_specs=[spec(x) for x in inputs],
    out_specs=[spec(x) for x in (*made, *ends)],
    out_shape=[x.array for x in (*made, *ends)],
    compiler_params=params,
    interpret=how.interpret,
    name=f"favor{step.func.__name__}",  # type: ignore[attr-defined]
  )(*(x.array for x in inputs))
  return found[: len(made)], found[len(made) :]
