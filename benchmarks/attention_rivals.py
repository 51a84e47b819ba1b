"""What causal FAVOR+ is compared with, in JAX: written from the papers' descriptions.

All take q, k and v (B L H K), both q and k scaled by K ** -0.25, and w (R x K).
"""

import jax
import jax.numpy as jnp

STABILISER = 1e-6  # of the official code: after the exponential, and of denominators


def exact(q, k, v, w):
  """Softmax attention over all pairs, by XLA."""
  del w
  return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)


def official(q, k, v, w):
  """The official JAX algorithm (arXiv:2009.14794): a scan over tokens.

  Its backward pass gets earlier sums by taking keys off again. Keys are stabilised by
  the largest exponent of the whole sequence, which lets outputs depend on later keys.
  """
  dtype, v = v.dtype, v.astype(jnp.float32)
  q, k = _stabilised(q, w, (-1,)), _stabilised(k, w, (-1, -3))
  q, k, v = (jnp.moveaxis(x, 1, 0) for x in (q, k, v))  # L B H ...
  above = _products(q, k, v)
  below = _products(q, k, jnp.ones_like(v[..., :1]))
  below = below + 2 * STABILISER * (jnp.abs(below) <= STABILISER)
  return jnp.moveaxis(above / below, 0, 1).astype(dtype)


def _stabilised(x, w, axes):
  x = x.astype(jnp.float32)
  a = jnp.einsum("blhk,rk->blhr", x, w, precision="highest")
  top = jax.lax.stop_gradient(a.max(axis=axes, keepdims=True))
  half = jnp.sum(x * x, axis=-1, keepdims=True) / 2
  return w.shape[0] ** -0.5 * (jnp.exp(a - half - top) + STABILISER)


@jax.custom_vjp
def _products(q, k, v):
  return _products_forward(q, k, v)[0]


def _products_forward(q, k, v):
  def one(sums, now):
    q, k, v = now
    sums = sums + k[..., None] * v[..., None, :]
    return sums, jnp.einsum("bhr,bhrk->bhk", q, sums)

  start = jnp.zeros((*k.shape[1:], v.shape[-1]), v.dtype)
  sums, out = jax.lax.scan(one, start, (q, k, v))
  return out, (q, k, v, sums)


def _products_backward(saved, slope):
  q, k, v, sums = saved

  def one(carry, now):
    sums, ahead = carry
    q, k, v, slope = now
    by_q = jnp.einsum("bhrk,bhk->bhr", sums, slope)
    ahead = ahead + q[..., None] * slope[..., None, :]
    by_k = jnp.einsum("bhrk,bhk->bhr", ahead, v)
    by_v = jnp.einsum("bhrk,bhr->bhk", ahead, k)
    sums = sums - k[..., None] * v[..., None, :]
    return (sums, ahead), (by_q, by_k, by_v)

  start = (sums, jnp.zeros_like(sums))
  return jax.lax.scan(one, start, (q, k, v, slope), reverse=True)[1]


_products.defvjp(_products_forward, _products_backward)


def naive(q, k, v, w):
  """A prefix sum over tokens by an associative scan: every token keeps its state."""
  dtype, v = v.dtype, v.astype(jnp.float32)
  q, k = _stabilised(q, w, (-1,)), _stabilised(k, w, (-1, -3))
  sums = jax.lax.associative_scan(jnp.add, k[..., None] * v[..., None, :], axis=1)
  keys = jax.lax.associative_scan(jnp.add, k, axis=1)
  above = jnp.einsum("blhr,blhrk->blhk", q, sums)
  return (above / jnp.einsum("blhr,blhr->blh", q, keys)[..., None]).astype(dtype)
