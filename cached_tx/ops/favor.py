"""FAVOR+: causal linear attention by positive random features.

Choromanski et al., 2021, arXiv:2009.14794. With w_r ~ N(0, I), the features
phi_r(x) = exp(w_r . x - |x|^2 / 2) estimate the softmax kernel (Lemma 1), and

  out_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / sum_{s<=t} phi(q_t) . phi(k_s)

needs only the sums of phi(k) v and phi(k) over the keys so far. They are kept
relative to the running maximum mu_t of the key exponents, which decays older sums
by exp(mu_s - mu_t) <= 1: nothing overflows, no epsilon is added, and a later key
has no influence on an earlier output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.ops.documents import document_ids
from cached_tx.types import DType, Heads, Mask, Segment

EMPTY = -1e30  # the maximum over no key; finite, for EMPTY - EMPTY must be 0
Features = Float[Array, "B L H R"]
Exponents = Float[Array, "B L H"]


class PrefixSums(NamedTuple):
  """Sums over the earlier keys of each row's document, divided by exp(top).

  Attributes:
    values: sum of phi(k) v. float32 or wider.
    keys: sum of phi(k).
    top: mu, the largest exponent of any summed key; a constant for the gradient.
  """

  values: Float[Array, "B H R K"]
  keys: Float[Array, "B H R"]
  top: Float[Array, "B H"]

  def cleared(self) -> "PrefixSums":
    """The sums with 0 where no key was summed, whatever stands there."""
    some = self.top > EMPTY
    return PrefixSums(
      jnp.where(some[..., None, None], self.values, 0),
      jnp.where(some[..., None], self.keys, 0),
      self.top,
    )


def no_sums(
  batch: int, heads: int, features: int, width: int, dtype: DType = jnp.float32
) -> PrefixSums:
  """Sums over no key, in float32 or wider."""
  dtype = jnp.promote_types(dtype, jnp.float32)
  return PrefixSums(
    jnp.zeros((batch, heads, features, width), dtype),
    jnp.zeros((batch, heads, features), dtype),
    jnp.full((batch, heads), EMPTY, dtype),
  )


def orthogonal_projection(key: Array, features: int, width: int) -> Float[Array, "R K"]:
  """Rows w_r with N(0, I) marginals, orthogonal within each block of K rows.

  Haar-distributed directions (the QR factor's signs are fixed, or the estimate is
  biased) times the norms of independent Gaussian rows. float32.
  """
  directions, norms = jax.random.split(key)
  count = -(-features // width)
  square = jax.random.orthogonal(directions, width, (count,), jnp.float32)
  rows = square.reshape(count * width, width)[:features]
  gaussian = jax.random.normal(norms, (features, width), jnp.float32)
  return rows * jnp.linalg.norm(gaussian, axis=-1, keepdims=True)


def log_features(x: Heads, w: Float[Array, "R K"]) -> Features:
  """w_r . x - |x|^2 / 2, in float32 at least: its error will be exponentiated."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  products = jnp.einsum(
    "blhk,rk->blhr", x, w.astype(x.dtype), precision=jax.lax.Precision.HIGHEST
  )
  return products - jnp.sum(x * x, axis=-1, keepdims=True) / 2


def running_maximum(
  top: Exponents, starts: Mask, before: Float[Array, "B H"]
) -> Exponents:
  """Largest exponent up to each token within its document, `before` included."""

  def join(a, b):
    (top_a, start_a), (top_b, start_b) = a, b
    return jnp.where(start_b, top_b, jnp.maximum(top_a, top_b)), start_a | start_b

  first = starts[:, :1, None]
  top = top.at[:, 0].set(
    jnp.where(first[:, 0], top[:, 0], jnp.maximum(top[:, 0], before))
  )
  flags = jnp.broadcast_to(starts[..., None], top.shape)
  return jax.lax.associative_scan(join, (top, flags), axis=1)[0]


class ChunkSums(NamedTuple):
  """Sums over one chunk's last document, relative to the running maximum at its end."""

  values: Float[Array, "N B H R K"]
  keys: Float[Array, "N B H R"]
  top: Float[Array, "N B H"]
  starts: Bool[Array, "N B H"]  # a document begins in here: nothing older counts


def join_sums(a: ChunkSums, b: ChunkSums) -> ChunkSums:
  """The sums over a's keys, then b's: the associative rule of the prefix sum."""
  decay = jnp.where(b.starts, 0, jnp.exp(jnp.minimum(a.top - b.top, 0)))
  older = jnp.where(b.starts[..., None], 0, a.keys)  # 0 times NaN would be NaN
  values = jnp.where(b.starts[..., None, None], 0, a.values)
  return ChunkSums(
    b.values + decay[..., None, None] * values,
    b.keys + decay[..., None] * older,
    b.top,
    a.starts | b.starts,
  )


def favor_attention(
  q: Heads,
  k: Heads,
  v: Heads,
  w: Float[Array, "R K"],
  segment: Segment,
  sums: PrefixSums,
  *,
  chunk: int = 128,
) -> tuple[Heads, PrefixSums]:
  """Causal softmax attention, estimated in time linear in L.

  An associative scan joins the sums of whole chunks; inside a chunk the products
  of queries and keys are taken pair by pair.

  Args:
    q, k: any float dtype, both already scaled by K ** -0.25.
    v: any float dtype; sets the dtype of the output.
    w: projection. Orthogonal rows lower the variance only.
    segment: document starts and valid tokens of the L positions.
    sums: sums over the earlier keys of each row's document.
    chunk: tokens per block. Changes speed and memory, not the estimate; L need
      not be a multiple.

  Returns:
    The output, 0 where no key is valid, and `sums` extended by these tokens.
    Gradients flow to q, k, v, `sums.values` and `sums.keys`; none to w, `sums.top`.
  """
  B, L, H, K = q.shape
  dtype = v.dtype
  w = jax.lax.stop_gradient(w)
  starts, valid = segment.starts, segment.real
  C = min(chunk, L)
  pad = -L % C

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))

  shown = padded(valid)[..., None]  # B L 1
  starts = padded(starts & valid)
  q, k, v = padded(q), padded(k), padded(v)
  k = jnp.where(shown[..., None], k, 0)
  v = jnp.where(shown[..., None], v, 0).astype(sums.values.dtype)

  a = log_features(jnp.where(shown[..., None], q, 0), w)
  queries = jnp.exp(a - jax.lax.stop_gradient(a.max(axis=-1, keepdims=True)))
  a = log_features(k, w)
  top = jnp.where(shown, jax.lax.stop_gradient(a.max(axis=-1)), EMPTY)
  top = top.astype(sums.top.dtype)
  mu = running_maximum(top, starts, jax.lax.stop_gradient(sums.top))  # B L H
  keys = jnp.exp(jnp.where(shown[..., None], a - mu[..., None], -jnp.inf))

  def chunked(x):  # B L ... -> N B C ...
    return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

  queries, keys, v, mu = chunked(queries), chunked(keys), chunked(v), chunked(mu)
  documents = document_ids(starts)
  ids = chunked(documents)  # N B C

  end = mu[:, :, -1]  # N B H
  last = ids == ids[:, :, -1:]
  late = jnp.where(last[..., None], mu - end[:, :, None], -jnp.inf)
  late = jnp.exp(late)  # N B C H
  weighted = keys * late[..., None]
  own = ChunkSums(
    jnp.einsum("nbchr,nbchk->nbhrk", weighted, v),
    weighted.sum(axis=2),
    end,
    jnp.broadcast_to(chunked(starts).any(axis=2)[..., None], end.shape),
  )
  carried = ChunkSums(
    sums.values[None],
    sums.keys[None],
    jax.lax.stop_gradient(sums.top)[None],
    jnp.zeros((1, B, H), bool),
  )
  totals = jax.lax.associative_scan(
    join_sums, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), carried, own)
  )
  before = jax.tree.map(lambda x: x[:-1], totals)

  # What the tokens of earlier chunks bring, as long as no document began since.
  began = jnp.cumsum(chunked(starts), axis=2) > 0  # N B C
  fade = jnp.exp(jnp.minimum(before.top[:, :, None] - mu, 0))
  fade = jnp.where(began[..., None], 0, fade)  # N B C H
  asking = jnp.where(began[..., None, None], 0, queries)  # and no gradient is NaN
  above = jnp.einsum("nbchr,nbhrk->nbchk", asking, before.values)
  above = jnp.where(began[..., None, None], 0, above) * fade[..., None]
  below = jnp.einsum("nbchr,nbhr->nbch", asking, before.keys)
  below = jnp.where(began[..., None], 0, below) * fade

  # What the tokens of the own chunk bring.
  seen = jnp.tril(jnp.ones((C, C), bool))[None, None]
  seen = seen & (ids[:, :, :, None] == ids[:, :, None])  # N B C C
  mu = jnp.moveaxis(mu, 3, 2)  # N B H C
  gap = jnp.where(seen[:, :, None], mu[:, :, :, None] - mu[..., None], -jnp.inf)
  pairs = jnp.einsum("nbchr,nbshr->nbhcs", queries, keys) * jnp.exp(gap)
  above = above + jnp.einsum("nbhcs,nbshk->nbchk", pairs, v)
  below = below + jnp.moveaxis(pairs.sum(axis=-1), 2, 3)

  some = below > 1e-18  # a bare floor would differentiate into NaN
  out = jnp.where(some[..., None], above / jnp.where(some, below, 1)[..., None], 0)
  out = jnp.where(jnp.isnan(below)[..., None], jnp.nan, out)  # seen, not taken for 0
  out = jnp.moveaxis(out, 0, 1).reshape(B, L + pad, H, K)[:, :L]
  out = jnp.where(valid[..., None, None], out, 0).astype(dtype)
  final = PrefixSums(totals.values[-1], totals.keys[-1], totals.top[-1])
  return out, final
