"""The causal form of FAVOR+, and its gradient.

Forward and backward go over spans of tokens; a span is a batch of chunks, of which
ops/sums.py has the mathematics. `favor_attention` of ops/favor.py is what to call.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cached_tx.ops.features import FeatureMap
from cached_tx.ops.pieces import (
  as_bits,
  as_number,
  chunked,
  cut_out,
  put_in,
  spans,
  unchunked,
)
from cached_tx.ops.projections import Rows
from cached_tx.ops.sums import (
  EMPTY,
  Part,
  Sums,
  added,
  asked,
  divided,
  extended,
  faded,
  joined,
  mixed,
  precision_of,
  pulled,
  weights,
  with_ones,
)


class How(NamedTuple):
  """What is known before anything runs."""

  features: FeatureMap
  chunk: int
  span: int
  form: str  # associative or scan


class CallTokens(NamedTuple):
  """Some of the tokens of a call: q, k and v, and which count."""

  q: Float[Array, "B T H K"]
  k: Float[Array, "B T H K"]
  v: Float[Array, "B T H Kv"]
  starts: Bool[Array, "B T"]
  shown: Bool[Array, "B T"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def causal(
  how: How, tokens: CallTokens, w: Rows | None, sums: Sums
) -> tuple[Array, Sums]:
  """The output, and the sums after the tokens of a call; `sums` are those before."""
  (out, _), after, _ = _forward(how, tokens, w, sums)
  return out, after


def _forward(
  how: How, tokens: CallTokens, w: Rows | None, sums: Sums
) -> tuple[tuple[Array, Array], Sums, Sums]:
  """Output and denominators, the sums afterwards, and those before every span."""
  B, L, H, K = tokens.v.shape
  full, rest = _in_turn(how, L)
  cut = lambda at, size: jax.tree.map(lambda x: cut_out(x, at, size), tokens)
  if not full:
    found, after = _span(how, tokens, w, sums)
    return found, after, jax.tree.map(lambda x: x[None], sums)

  def one(carry, n):
    before, found = carry
    now, after = _span(how, cut(n * how.span, how.span), w, before)
    put = lambda x, part: put_in(x, part, n * how.span)
    return (after, jax.tree.map(put, found, now)), before

  dtypes = tokens.v.dtype, sums.both.dtype
  found = jnp.zeros((B, L, H, K), dtypes[0]), jnp.zeros((B, L, H), dtypes[1])
  start = sums, jax.tree.map(as_bits, found)
  (after, found), befores = jax.lax.scan(one, start, jnp.arange(full))
  if rest:
    last = after
    now, after = _span(how, cut(full * how.span, rest), w, last)
    found = jax.tree.map(lambda x, part: put_in(x, part, full * how.span), found, now)
    befores = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), befores, last)
  return (
    (as_number(found[0], dtypes[0]), as_number(found[1], dtypes[1])),
    after,
    befores,
  )


def _in_turn(how: How, length: int) -> tuple[int, int]:
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
  full, rest = _in_turn(how, out.shape[1])

  def one(n, size, after):
    at = n * how.span
    cut = lambda x: cut_out(x, at, size)
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
      put = lambda x, part: put_in(x, part, n * how.span)
      return (jax.tree.map(put, found, now), after), None

    found = tuple(as_bits(jnp.zeros(x.shape, x.dtype)) for x in tokens[:3])
    if last is not None:
      at = full * how.span
      found = tuple(put_in(x, y, at) for x, y in zip(found, last, strict=True))
    start = (found, after)
    (found, after), _ = jax.lax.scan(step, start, jnp.arange(full), reverse=True)
    q, k, v = map(as_number, found, [x.dtype for x in tokens[:3]])
  nothing = None if w is None else jnp.zeros_like(w)
  top = jnp.zeros_like(befores.top[0])
  flags: Any = [np.zeros(x.shape, jax.dtypes.float0) for x in tokens[3:]]
  return CallTokens(q, k, v, *flags), nothing, Sums(after, top)


causal.defvjp(_causal_forward, _causal_backward)


class _Chunks(NamedTuple):
  """The tokens of a span, chunk by chunk; zeros where padding is."""

  q: Float[Array, "N B H C K"]
  k: Float[Array, "N B H C K"]
  v: Float[Array, "N B H C Kv"]
  starts: Bool[Array, "N B 1 C"]
  shown: Bool[Array, "N B 1 C"]


def _chunks(how: How, tokens: CallTokens) -> _Chunks:
  shown = tokens.shown[..., None, None]
  q, k, v = (chunked(jnp.where(shown, x, 0), how.chunk) for x in tokens[:3])
  flags = (spans(x, how.chunk)[:, :, None] for x in (tokens.starts, tokens.shown))
  return _Chunks(q, k, v, *flags)


def _mapped(how: How, w: Rows | None, x: Array) -> tuple[Array, Array]:
  found = how.features(x, w)
  return found.values, found.scale


def _span(
  how: How, tokens: CallTokens, w: Rows | None, sums: Sums
) -> tuple[tuple[Array, Array], Sums]:
  """Output and denominators of a span, and the sums after it."""
  precision = precision_of(tokens.v)
  wide = sums.both.dtype

  def out(total):
    out, below = divided(total)
    return out.astype(tokens.v.dtype), below

  def scan(chunks, sums):
    def one(sums, now):
      (k, scale), v = _mapped(how, w, now.k), with_ones(now.v, wide)
      share = weights(scale, now.starts, now.shown, sums.top)
      total = mixed(_mapped(how, w, now.q)[0], k, v, share, sums, precision)
      return extended(added(k, v, share, precision), share, sums), out(total)

    sums, found = jax.lax.scan(one, sums, chunks)
    return found, sums

  def associative(chunks, sums):
    (k, scale), v = _mapped(how, w, chunks.k), with_ones(chunks.v, wide)
    before, after = _prefix(k, v, scale, chunks, sums, precision)
    share = weights(scale, chunks.starts, chunks.shown, before.top)
    total = mixed(_mapped(how, w, chunks.q)[0], k, v, share, before, precision)
    return out(total), after

  found, after = (scan if how.form == "scan" else associative)(
    _chunks(how, tokens), sums
  )
  size = tokens.q.shape[1]
  y = jnp.where(tokens.shown[..., None, None], unchunked(found[0], size), 0)
  return (y, unchunked(found[1][..., None], size)[..., 0]), after


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
  how: How, tokens: CallTokens, w: Rows | None, sums: Sums, ahead: Array, after: Array
) -> tuple[tuple[Array, Array, Array], Array]:
  """Cotangents of a span's q, k and v, and of the sums before it.

  Args:
    ahead: of numerators and denominators (B T H K1).
    after: of the sums after the span.
  """
  precision = precision_of(tokens.v)
  wide = sums.both.dtype
  size = tokens.q.shape[1]
  ahead = jnp.where(tokens.shown[..., None, None], ahead, 0)

  def features(x):
    values, pull, scale = jax.vjp(lambda x: _mapped(how, w, x), x, has_aux=True)
    return values, lambda slope: pull(slope.astype(values.dtype))[0], scale

  def scan(chunks, ahead, sums, after):
    def forth(sums, now):
      (k, scale), v = _mapped(how, w, now.k), with_ones(now.v, wide)
      share = weights(scale, now.starts, now.shown, sums.top)
      return extended(added(k, v, share, precision), share, sums), sums

    _, befores = jax.lax.scan(forth, sums, chunks)

    def back(after, now):
      chunk, ahead, before = now
      q, pull_q, _ = features(chunk.q)
      k, pull_k, scale = features(chunk.k)
      v = with_ones(chunk.v, wide)
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
    v = with_ones(chunks.v, wide)
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

  given = (_chunks(how, tokens), chunked(ahead, how.chunk), sums, after)
  slopes, after = (scan if how.form == "scan" else associative)(*given)
  shown = tokens.shown[..., None, None]
  q, k, v = (jnp.where(shown, unchunked(x, size), 0) for x in slopes)
  return (q, k, v), after
