"""FAVOR+: linear attention by random features.

Choromanski et al., 2021, arXiv:2009.14794. Features of queries and keys stand for the
softmax kernel (ops/features.py), so that attention needs sums over keys instead of
pairs (ops/sums.py): time linear in L.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cached_tx.ops.favor_kernel import chosen, favor_kernel, misfit
from cached_tx.ops.features import FEATURES, FeatureMap
from cached_tx.ops.projections import Rows
from cached_tx.ops.sums import (
  EMPTY,
  FLOOR,
  Part,
  PrefixSums,
  Sums,
  added,
  asked,
  extended,
  faded,
  joined,
  mixed,
  no_sums,
  packed,
  pulled,
  unpacked,
  weights,
)
from cached_tx.types import Heads, Mask, Segment

__all__ = [
  "PrefixSums",
  "favor_attention",
  "favor_bidirectional",
  "favor_sums",
  "no_sums",
]

FORMS = ("associative", "scan")  # of any features, on any device
KERNEL = "kernel"  # ops/favor_kernel.py
SPAN = 2048
Keys = Float[Array, "B S H K"]


class _How(NamedTuple):
  """What is known before anything runs."""

  features: FeatureMap
  chunk: int
  span: int
  form: str | None


class _Tokens(NamedTuple):
  """Some of the tokens of a call: q, k and v, and which count."""

  q: Float[Array, "B T H K"]
  k: Float[Array, "B T H K"]
  v: Float[Array, "B T H Kv"]
  starts: Bool[Array, "B T"]
  shown: Bool[Array, "B T"]


def favor_attention(
  q: Heads,
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  sums: PrefixSums,
  *,
  features: FeatureMap = FEATURES["positive"],
  chunk: int = 128,
  span: int | None = None,
  form: str | None = None,
) -> tuple[Float[Array, "B L H Kv"], PrefixSums]:
  """Causal attention, in time linear in L.

  Inside a chunk, pairs of queries and keys are taken one by one; all that is older
  comes through sums. Two forms give the same but for rounding: an associative scan
  joins the sums of all chunks at once, or a scan takes chunk after chunk. Spans
  follow one another in either form, and the backward pass computes features and sums
  of one span at a time anew, so that memory beyond arguments and results is that of
  one span, of one state per span and of one number per token and head.

  Args:
    q, k: any float dtype, both already scaled by K ** -0.25.
    v: any float dtype; sets the dtype of the output. Products of float32 are taken in
      full precision; sums and features are in float32 at least whatever the dtype.
    w: projection, for features that have one.
    segment: document starts and valid tokens of the L positions.
    sums: sums over the earlier keys of each row's document.
    features: of queries and keys.
    chunk: tokens per chunk. It changes speed and memory, not the estimate; L need not
      be a multiple.
    span: tokens whose features and sums exist at a time, a multiple of `chunk`. None:
      2048, or as many whole chunks as fit.
    form: associative or scan, or kernel, which is `favor_kernel` (ops/favor_kernel.py)
      with its own limits and without spans. None: the kernel on devices where it was
      seen to be faster, of which there is none yet; else the scan on a CPU, where it
      needs a third of the memory and is faster forward, though not backward; else
      associative.

  Returns:
    The output, 0 at padding and where no key is valid, and `sums` extended by these
    tokens. Where all products of features of a query and the keys it sees are below
    1e-30, the output is 0: at scales of q and k of 6 and more in float32. Gradients
    flow to q, k, v, `sums.values` and `sums.keys`; none to w and `sums.top`.

  Raises:
    ValueError: for a `chunk`, `span` or `form` that is not one, for sums that are
      of other features, and for what the kernel cannot do where it is asked for.
  """
  if span is None:
    span = max(SPAN // max(chunk, 1), 1) * chunk
  if chunk < 1 or span < chunk or span % chunk:
    raise ValueError(
      f"chunk is {chunk} and span {span}; chunk must be 1 or more, and span a multiple"
    )
  if form is not None and form not in (*FORMS, KERNEL):
    raise ValueError(f"form is {form!r}; one of {', '.join(FORMS)}, {KERNEL}, or None")
  made = features.count(None if w is None else w.shape[0], q.shape[-1])
  if sums.values.shape[2:] != (made, v.shape[-1]):
    raise ValueError(
      f"sums are of {sums.values.shape[2]} features and values {sums.values.shape[3]} "
      f"wide, but there are {made} features and values {v.shape[-1]} wide"
    )
  if not v.shape[1]:
    return v, sums
  if form is None and chosen(jax.devices()[0].device_kind):
    fits = misfit(features, w, chunk, q.shape[-1], v.shape[-1]) is None
    form = KERNEL if fits else None
  if form == KERNEL:
    options: Any = {"features": features, "chunk": chunk}
    return favor_kernel(q, k, v, w, segment, sums, **options)
  how = _How(features, chunk, span, form)
  tokens = _Tokens(q, k, v, segment.starts & segment.real, segment.real)
  wide = jnp.promote_types(jnp.result_type(q, k, v), sums.values.dtype)
  before = jax.tree.map(lambda x: x.astype(wide), packed(sums))
  out, after = _causal(how, tokens, _constant(w), before)
  return out, unpacked(jax.tree.map(lambda x: x.astype(sums.values.dtype), after))


def favor_bidirectional(
  q: Float[Array, "B L H K"],
  k: Keys,
  v: Float[Array, "B S H Kv"],
  w: Rows | None,
  *,
  queries: Mask | None = None,
  keys: Bool[Array, "B S"] | None = None,
  documents: Int[Array, "B L"] | None = None,
  features: FeatureMap = FEATURES["positive"],
  span: int = SPAN,
  chunk: int = 128,
) -> Float[Array, "B L H Kv"]:
  """Attention of every query to every key, in time linear in L and S.

  Args:
    q, k, v, w, features: as of `favor_attention`. Queries and keys may differ in
      number: cross attention.
    queries: which queries are real; the others get 0. None: all.
    keys: which keys exist. None: all.
    documents: where a row holds several: the number of each token's document, padding
      inside it included; tokens of one document stand side by side. A query then sees
      the keys of its document alone. Memory grows by nine states per chunk, forward
      and backward together, and the time is about twice as long. None: a row is one
      document.
    span: tokens whose features exist at a time.
    chunk: tokens per chunk where `documents` are given. It changes speed and memory,
      not the estimate.

  Returns:
    The output, 0 where there is no key. Gradients flow to q, k and v.

  Raises:
    ValueError: for a `span` or `chunk` that is not one, and for documents where
      queries and keys differ in number.
  """
  _check_span(span)
  if chunk < 1:
    raise ValueError(f"chunk is {chunk}; it counts tokens: 1 or more")
  if documents is not None and q.shape[1] != k.shape[1]:
    raise ValueError(
      f"documents are those of {q.shape[1]} queries, but there are {k.shape[1]} keys: "
      "leave documents out, or attend among tokens of one sequence"
    )
  if not q.shape[1]:
    return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
  w = _constant(w)
  everything = lambda x: jnp.ones(x.shape[:2], bool)
  keys = everything(k) if keys is None else keys
  queries = everything(q) if queries is None else queries
  q = jnp.where(queries[..., None, None], q, 0)
  if documents is not None:
    out = _by_document(_How(features, chunk, span, None), q, k, v, w, keys, documents)
    return jnp.where(queries[..., None, None], out, 0)
  sums = _summed(features, span, k, v, w, keys)

  @jax.checkpoint
  def ask(q):
    total = _einsum(v, "bthr,bhrk->bthk", features(q, w).values, sums.both)
    return _divided(total)[0].astype(v.dtype)

  out = jnp.moveaxis(jax.lax.map(ask, _spans(q, span)), 0, 1)
  out = out.reshape(q.shape[0], -1, *out.shape[3:])[:, : q.shape[1]]
  return jnp.where(queries[..., None, None], out, 0)


def favor_sums(
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  *,
  features: FeatureMap = FEATURES["positive"],
  span: int = SPAN,
) -> Part:
  """The sums over the keys of each row's last document in this call, and no others.

  Args: as of `favor_attention`.

  Returns:
    The sums, and whether a document begins in this call, by row. Gradients flow to k
    and v.
  """
  _check_span(span)
  starts, real = segment.starts & segment.real, segment.real
  begun = jnp.cumsum(starts, axis=1)
  last = real & (begun == begun[:, -1:])
  fresh = jnp.broadcast_to(starts.any(axis=1)[:, None], (k.shape[0], k.shape[2]))
  return Part(_summed(features, span, k, v, _constant(w), last), fresh)


def _check_span(span: int) -> None:
  if span < 1:
    raise ValueError(f"span is {span}; it counts tokens: 1 or more")


def _constant(w: Rows | None) -> Rows | None:
  return None if w is None else jax.lax.stop_gradient(w)


def _summed(
  features: FeatureMap,
  span: int,
  k: Keys,
  v: Array,
  w: Rows | None,
  shown: Bool[Array, "B S"],
) -> Sums:
  """The sums over all shown keys."""
  k = jnp.where(shown[..., None, None], k, 0)
  v = jnp.where(shown[..., None, None], v, 0)
  if not k.shape[1]:  # one key that is not shown, so that every span holds some
    k, v, shown = (_padded(x, 1) for x in (k, v, shown))
  k, v, shown = (_spans(x, span) for x in (k, v, shown))
  # Scales are computed once: twice, large ones might differ.
  scale = jax.lax.map(lambda k: features(k, w).scale, k)
  scale = jnp.where(shown[..., None], jax.lax.stop_gradient(scale), EMPTY)  # N B T H
  top = scale.max(axis=(0, 2))
  share = jnp.where(shown[..., None], jnp.exp(scale - top[None, :, None]), 0)

  @jax.checkpoint
  def part(k, v, share):
    values = features(k, w).values
    both = _with_ones(v, values.dtype) * share[..., None]
    return _einsum(v, "bthr,bthk->bhrk", values, both)

  if len(k) == 1:
    return Sums(part(k[0], v[0], share[0]), top)
  shape = jax.eval_shape(part, k[0], v[0], share[0])
  add = lambda total, now: (total + part(*now), None)
  start = jnp.zeros(shape.shape, shape.dtype)
  return Sums(jax.lax.scan(add, start, (k, v, share))[0], top)


def _spans(x: Array, span: int) -> Array:
  """B L ... -> N B T ..., with zeros behind: the pieces of at most `span` tokens."""
  T = min(span, x.shape[1])
  x = _padded(x, -x.shape[1] % T)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, T, *x.shape[2:]), 1, 0)


def _padded(x: Array, size: int) -> Array:
  """B L ... with `size` zeros behind the L."""
  return jnp.pad(x, ((0, 0), (0, size)) + ((0, 0),) * (x.ndim - 2))


def _precision(v: Array) -> jax.lax.PrecisionLike:
  """Of products with values: in full, unless the values themselves are coarse."""
  return jax.lax.Precision.HIGHEST if v.dtype.itemsize >= 4 else None


def _einsum(v: Array, rule: str, a: Array, b: Array) -> Array:
  return jnp.einsum(rule, a, b, precision=_precision(v))


def _with_ones(v: Array, dtype: Any) -> Array:
  """Values and a channel of ones, whose sum is the denominator."""
  return jnp.concatenate([v.astype(dtype), jnp.ones((*v.shape[:-1], 1), dtype)], -1)


def _divided(total: Float[Array, "... K1"]) -> tuple[Array, Array]:
  """Numerator by denominator, 0 where there is none; and the denominator.

  It is infinite where no gradient can go.
  """
  below = total[..., -1:]
  none = jnp.abs(below) <= FLOOR  # not so for NaN, which is to be seen
  below = jnp.where(none, 1, below)
  # By a constant first: the square of a small denominator would be 0 in the gradient.
  scale = jax.lax.stop_gradient(below)
  out = jnp.where(none, 0, (total[..., :-1] / scale) / (below / scale))
  return out, jnp.where(none | jnp.isnan(below), jnp.inf, below)[..., 0]


# The bidirectional form where rows hold several documents. Sums over a document that
# touches a border between chunks are put together from both sides of it.


class _Own(NamedTuple):
  """Keys of a batch of chunks, and where documents end in them."""

  k: Float[Array, "N B H C R"]
  both: Float[Array, "N B H C K1"]
  scale: Float[Array, "N B H C"]
  shown: Bool[Array, "N B 1 C"]
  begun: Int[Array, "N B 1 C"]  # documents that began in the chunk up to this token

  @property
  def last(self) -> Bool[Array, "N B 1 C"]:
    """Which tokens are of the document that the chunk ends in."""
    return self.begun == self.begun[..., -1:]


def _by_document(
  how: _How,
  q: Heads,
  k: Heads,
  v: Array,
  w: Rows | None,
  keys: Mask,
  documents: Int[Array, "B L"],
) -> Array:
  """The output of every query over the keys of its own document.

  X_n, the sums over all of the document that chunk n ends in, serves every token of
  the chunk that is of it, and those of chunk n + 1 that still are. Documents that lie
  inside a chunk and touch none of its borders are left: their pairs are taken one by
  one, where there are any.
  """
  size = min(how.chunk, q.shape[1])
  span = max(how.span // size, 1) * size
  k, v = (jnp.where(keys[..., None, None], x, 0) for x in (k, v))
  new = documents[:, 1:] != documents[:, :-1]
  starts = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
  tokens = tuple(_spans(x, span) for x in (k, v, starts, keys))

  def chunks(k, v, starts, shown):
    k, scale = how.features(_chunked(k, size), w)
    starts, shown = (_spans(x, size)[:, :, None] for x in (starts, shown))
    begun = jnp.cumsum(starts, axis=-1)
    return _Own(k, _with_ones(_chunked(v, size), k.dtype), scale, shown, begun)

  @jax.checkpoint
  def borders(tokens):
    own = chunks(*tokens)
    fresh = jnp.broadcast_to(own.begun[..., -1] > 0, own.scale.shape[:-1])
    ends = _total(v, own, own.last), _total(v, own, own.begun == 0)
    return tuple(Part(sums, fresh) for sums in ends)

  @jax.checkpoint
  def ask(now):
    q, tokens, here, edge = now
    before = jnp.concatenate([edge[None], here[:-1]])
    own, values = chunks(*tokens), how.features(_chunked(q, size), w).values
    older = (own.begun == 0) & ~own.last
    total = jnp.where(
      own.last[..., None],
      _picked(v, values, own.last, here),
      _picked(v, values, older, before),
    )
    inner = ~(own.last | older)
    total = jax.lax.cond(
      inner.any(),
      lambda: jnp.where(inner[..., None], _paired(v, values, own, inner), total),
      lambda: total,
    )
    return _joined(_divided(total)[0].astype(v.dtype), q.shape[1])

  flat = lambda x: x.reshape(-1, *x.shape[2:])
  last, first = jax.tree.map(flat, jax.lax.map(borders, tokens))
  here = _both_ways(last, first)
  here = here.reshape(tokens[0].shape[0], -1, *here.shape[1:])
  edges = jnp.concatenate([jnp.zeros_like(here[:1, -1]), here[:-1, -1]])
  asks = _spans(q, span), tokens, here, edges
  out = jnp.moveaxis(jax.lax.map(ask, asks), 0, 1)
  return out.reshape(q.shape[0], -1, *out.shape[3:])[:, : q.shape[1]]


def _total(v: Array, own: _Own, which: Bool[Array, "N B 1 C"]) -> Sums:
  """The sums over some keys of each chunk."""
  which = which & own.shown
  top = jnp.where(which, own.scale, EMPTY).max(axis=-1)
  gap = jnp.minimum(own.scale - top[..., None], 0)
  share = jnp.where(which, jnp.exp(gap), 0)[..., None]
  return Sums(_einsum(v, "nbhcr,nbhck->nbhrk", own.k, faded(share, own.both)), top)


def _both_ways(last: Part, first: Part) -> Float[Array, "N B H R K1"]:
  """X_n, of the sums of each chunk over the documents it ends in and began in."""
  some = jnp.zeros_like(last.fresh[0])
  nothing = jnp.zeros_like(last.sums.both[0]), jnp.full_like(last.sums.top[0], EMPTY)
  empty = Part(Sums(*nothing), some)

  def forth(before, now):
    before = joined(before, now)
    return before, before.sums

  def back(behind, now):
    before, own = now
    whole = joined(Part(before, some), Part(behind.sums, some))
    return joined(behind, own), whole.sums.both

  _, before = jax.lax.scan(forth, empty, last)
  return jax.lax.scan(back, empty, (before, first), reverse=True)[1]


def _picked(
  v: Array,
  q: Float[Array, "N B H C R"],
  which: Bool[Array, "N B 1 C"],
  sums: Float[Array, "N B H R K1"],
) -> Float[Array, "N B H C K1"]:
  """Numerator and denominator of the queries that the sums are for."""
  q = jnp.where(which[..., None], q, 0)  # 0 x NaN, in the gradient, would be NaN
  return _einsum(v, "nbhcr,nbhrk->nbhck", q, sums)


def _paired(
  v: Array, q: Float[Array, "N B H C R"], own: _Own, which: Bool[Array, "N B 1 C"]
) -> Float[Array, "N B H C K1"]:
  """The same by pairs of tokens of one document inside a chunk."""
  seen = own.begun[..., :, None] == own.begun[..., None, :]
  seen = seen & which[..., :, None] & own.shown[..., None, :]
  scale = own.scale[..., None, :]
  top = jnp.where(seen, scale, EMPTY).max(axis=-1, keepdims=True)
  share = jnp.where(seen, jnp.exp(jnp.minimum(scale - top, 0)), 0)
  pairs = faded(share, _einsum(v, "nbhcr,nbhsr->nbhcs", q, own.k))
  return _einsum(v, "nbhcs,nbhsk->nbhck", pairs, own.both)


# The causal form. Forward and backward go over spans; a span is a batch of chunks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(
  how: _How, tokens: _Tokens, w: Rows | None, sums: Sums
) -> tuple[Array, Sums]:
  (out, _), after, _ = _forward(how, tokens, w, sums)
  return out, after


def _forward(
  how: _How, tokens: _Tokens, w: Rows | None, sums: Sums
) -> tuple[tuple[Array, Array], Sums, Sums]:
  """Output and denominators, the sums afterwards, and those before every span."""
  B, L, H, K = tokens.v.shape
  full, rest = _pieces(how, L)
  cut = lambda at, size: jax.tree.map(lambda x: _cut(x, at, size), tokens)
  if not full:
    found, after = _span(how, tokens, w, sums)
    return found, after, jax.tree.map(lambda x: x[None], sums)

  def one(carry, n):
    before, found = carry
    now, after = _span(how, cut(n * how.span, how.span), w, before)
    put = lambda x, part: _put(x, part, n * how.span)
    return (after, jax.tree.map(put, found, now)), before

  dtypes = tokens.v.dtype, sums.both.dtype
  found = jnp.zeros((B, L, H, K), dtypes[0]), jnp.zeros((B, L, H), dtypes[1])
  start = sums, jax.tree.map(_bits, found)
  (after, found), befores = jax.lax.scan(one, start, jnp.arange(full))
  if rest:
    last = after
    now, after = _span(how, cut(full * how.span, rest), w, last)
    found = jax.tree.map(lambda x, part: _put(x, part, full * how.span), found, now)
    befores = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), befores, last)
  return (_number(found[0], dtypes[0]), _number(found[1], dtypes[1])), after, befores


def _pieces(how: _How, length: int) -> tuple[int, int]:
  """How many whole spans there are in turn, and how many tokens are left for one more.

  A single one is not taken in turn. None are left of a multiple of the span: what is
  put into an array of 16-bit numbers after a loop would cost XLA a copy of it.
  """
  full = 0 if length <= how.span else length // how.span
  return full, length - full * how.span


def _causal_forward(how, tokens, w, sums):
  (out, below), after, befores = _forward(how, tokens, w, sums)
  return (out, after), (tokens, w, befores, out, below)


def _causal_backward(how, saved, cotangents):
  tokens, w, befores, out, below = saved
  slope, after = cotangents
  full, rest = _pieces(how, out.shape[1])

  def one(n, size, after):
    at = n * how.span
    cut = lambda x: _cut(x, at, size)
    before = jax.tree.map(lambda x: x[n], befores)
    ahead = cut(slope).astype(before.both.dtype)
    # Of the numerator, then the denominator. Where no gradient comes from, none goes,
    # even if the output is no number.
    ahead = jnp.where(ahead == 0, 0, ahead / cut(below)[..., None])
    own = jnp.where(ahead == 0, 0, ahead * cut(out))
    own = -own.sum(axis=-1, keepdims=True)
    both = jnp.concatenate([ahead, own], axis=-1)
    return _span_pull(how, jax.tree.map(cut, tokens), w, before, both, after)

  after = after.both
  last: Any = None
  if rest:
    last, after = one(full, rest, after)
  if not full:
    q, k, v = last
  else:

    def step(carry, n):
      found, after = carry
      now, after = one(n, how.span, after)
      put = lambda x, part: _put(x, part, n * how.span)
      return (jax.tree.map(put, found, now), after), None

    found = tuple(_bits(jnp.zeros(x.shape, x.dtype)) for x in tokens[:3])
    if last is not None:
      at = full * how.span
      found = tuple(_put(x, y, at) for x, y in zip(found, last, strict=True))
    start = (found, after)
    (found, after), _ = jax.lax.scan(step, start, jnp.arange(full), reverse=True)
    q, k, v = map(_number, found, [x.dtype for x in tokens[:3]])
  nothing = None if w is None else jnp.zeros_like(w)
  top = jnp.zeros_like(befores.top[0])
  flags: Any = [np.zeros(x.shape, jax.dtypes.float0) for x in tokens[3:]]
  return _Tokens(q, k, v, *flags), nothing, Sums(after, top)


_causal.defvjp(_causal_forward, _causal_backward)


def _cut(x: Array, at: Any, size: int) -> Array:
  """B L ... -> B T ...: `size` tokens from the one at `at`.

  Numbers of 16 bits are moved as integers: XLA's CPU backend would turn the whole of a
  bfloat16 array into float32 first, for every span. The barrier keeps it from making
  integers of the whole array before the loop.
  """
  if size == x.shape[1]:
    return x
  x, at = jax.lax.optimization_barrier((x, at))
  found = jax.lax.dynamic_slice_in_dim(_bits(x), at, size, axis=1)
  return _number(found, x.dtype)


def _put(x: Array, part: Array, at: Any) -> Array:
  """`x` with `part` from `at` on, both as bits."""
  return jax.lax.dynamic_update_slice_in_dim(x, _bits(part), at, axis=1)


def _bits(x: Array) -> Array:
  coarse = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if coarse else x


def _number(x: Array, dtype: Any) -> Array:
  return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


class _Chunks(NamedTuple):
  """The tokens of a span, chunk by chunk; zeros where padding is."""

  q: Float[Array, "N B H C K"]
  k: Float[Array, "N B H C K"]
  v: Float[Array, "N B H C Kv"]
  starts: Bool[Array, "N B 1 C"]
  shown: Bool[Array, "N B 1 C"]


def _chunked(x: Array, chunk: int) -> Array:
  """B T H K -> N B H C K, with zeros behind."""
  return jnp.moveaxis(_spans(x, chunk), 2, 3)


def _joined(x: Array, size: int) -> Array:
  """N B H C K -> B T H K."""
  x = jnp.moveaxis(jnp.moveaxis(x, 3, 2), 0, 1)  # B N C H K
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :size]


def _chunks(how: _How, tokens: _Tokens) -> _Chunks:
  shown = tokens.shown[..., None, None]
  q, k, v = (_chunked(jnp.where(shown, x, 0), how.chunk) for x in tokens[:3])
  flags = (_spans(x, how.chunk)[:, :, None] for x in (tokens.starts, tokens.shown))
  return _Chunks(q, k, v, *flags)


def _mapped(how: _How, w: Rows | None, x: Array) -> tuple[Array, Array]:
  found = how.features(x, w)
  return found.values, found.scale


def _by_form(how: _How, scan: Any, associative: Any, *args: Any) -> Any:
  """The form that was asked for, or the platform's."""
  if how.form is not None:
    return {"scan": scan, "associative": associative}[how.form](*args)
  return jax.lax.platform_dependent(*args, cpu=scan, default=associative)


def _span(
  how: _How, tokens: _Tokens, w: Rows | None, sums: Sums
) -> tuple[tuple[Array, Array], Sums]:
  """Output and denominators of a span, and the sums after it."""
  precision = _precision(tokens.v)
  wide = sums.both.dtype

  def out(total):
    out, below = _divided(total)
    return out.astype(tokens.v.dtype), below

  def scan(chunks, sums):
    def one(sums, now):
      (k, scale), v = _mapped(how, w, now.k), _with_ones(now.v, wide)
      share = weights(scale, now.starts, now.shown, sums.top)
      total = mixed(_mapped(how, w, now.q)[0], k, v, share, sums, precision)
      return extended(added(k, v, share, precision), share, sums), out(total)

    sums, found = jax.lax.scan(one, sums, chunks)
    return found, sums

  def associative(chunks, sums):
    (k, scale), v = _mapped(how, w, chunks.k), _with_ones(chunks.v, wide)
    before, after = _prefix(k, v, scale, chunks, sums, precision)
    share = weights(scale, chunks.starts, chunks.shown, before.top)
    total = mixed(_mapped(how, w, chunks.q)[0], k, v, share, before, precision)
    return out(total), after

  found, after = _by_form(how, scan, associative, _chunks(how, tokens), sums)
  size = tokens.q.shape[1]
  y = jnp.where(tokens.shown[..., None, None], _joined(found[0], size), 0)
  return (y, _joined(found[1][..., None], size)[..., 0]), after


def _prefix(
  k: Array, v: Array, scale: Array, chunks: _Chunks, sums: Sums, precision: Any
) -> tuple[Sums, Sums]:
  """The sums before every chunk, and after the last one."""
  nothing = jnp.full(scale.shape[:-1], EMPTY, scale.dtype)
  share = weights(scale, chunks.starts, chunks.shown, nothing)
  own = Sums(added(k, v, share, precision), share.top[..., -1])
  fresh = jnp.broadcast_to(chunks.starts.any(axis=-1), nothing.shape)
  carried = Part(sums, jnp.zeros(sums.top.shape, bool))
  parts = jax.tree.map(
    lambda x, y: jnp.concatenate([x[None], y]), carried, Part(own, fresh)
  )
  totals = jax.lax.associative_scan(joined, parts).sums
  return jax.tree.map(lambda x: x[:-1], totals), jax.tree.map(lambda x: x[-1], totals)


def _span_pull(
  how: _How, tokens: _Tokens, w: Rows | None, sums: Sums, ahead: Array, after: Array
) -> tuple[tuple[Array, Array, Array], Array]:
  """Cotangents of a span's q, k and v, and of the sums before it.

  Args:
    ahead: of numerators and denominators (B T H K1).
    after: of the sums after the span.
  """
  precision = _precision(tokens.v)
  wide = sums.both.dtype
  size = tokens.q.shape[1]
  ahead = jnp.where(tokens.shown[..., None, None], ahead, 0)

  def features(x):
    values, pull, scale = jax.vjp(lambda x: _mapped(how, w, x), x, has_aux=True)
    return values, lambda slope: pull(slope.astype(values.dtype))[0], scale

  def scan(chunks, ahead, sums, after):
    def forth(sums, now):
      (k, scale), v = _mapped(how, w, now.k), _with_ones(now.v, wide)
      share = weights(scale, now.starts, now.shown, sums.top)
      return extended(added(k, v, share, precision), share, sums), sums

    _, befores = jax.lax.scan(forth, sums, chunks)

    def back(after, now):
      chunk, ahead, before = now
      q, pull_q, _ = features(chunk.q)
      k, pull_k, scale = features(chunk.k)
      v = _with_ones(chunk.v, wide)
      share = weights(scale, chunk.starts, chunk.shown, before.top)
      found = pulled(q, k, v, share, before, ahead, after, precision)
      slopes = pull_q(found.q), pull_k(found.k), found.v[..., :-1].astype(chunk.v.dtype)
      earlier = asked(q, share, ahead, precision)
      return earlier + faded(share.older[..., -1, None, None], after), slopes

    after, slopes = jax.lax.scan(back, after, (chunks, ahead, befores), reverse=True)
    return slopes, after

  def associative(chunks, ahead, sums, after):
    q, pull_q, _ = features(chunks.q)
    k, pull_k, scale = features(chunks.k)
    v = _with_ones(chunks.v, wide)
    before, _ = _prefix(k, v, scale, chunks, sums, precision)
    share = weights(scale, chunks.starts, chunks.shown, before.top)
    own = asked(q, share, ahead, precision)
    decay = share.older[..., -1]

    def join(late, early):  # each: cotangent of the sums before, and what it decays by
      return early[0] + faded(early[1][..., None, None], late[0]), early[1] * late[1]

    own = jnp.concatenate([own, after[None]])
    decay = jnp.concatenate([decay, jnp.ones((1, *decay.shape[1:]), decay.dtype)])
    total, _ = jax.lax.associative_scan(join, (own, decay), reverse=True)
    found = pulled(q, k, v, share, before, ahead, total[1:], precision)
    slopes = pull_q(found.q), pull_k(found.k), found.v[..., :-1].astype(chunks.v.dtype)
    return slopes, total[0]

  given = (_chunks(how, tokens), _chunked(ahead, how.chunk), sums, after)
  slopes, after = _by_form(how, scan, associative, *given)
  shown = tokens.shown[..., None, None]
  q, k, v = (jnp.where(shown, _joined(x, size), 0) for x in slopes)
  return (q, k, v), after
