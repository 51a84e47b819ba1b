"""Pieces of arrays of tokens: cut out, and put back."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def spans(x: Array, span: int) -> Array:
  """B L ... -> N B T ..., with zeros behind: the pieces of at most `span` tokens."""
  T = min(span, x.shape[1])
  x = padded(x, -x.shape[1] % T)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, T, *x.shape[2:]), 1, 0)


def padded(x: Array, size: int) -> Array:
  """B L ... with `size` zeros behind the L."""
  return jnp.pad(x, ((0, 0), (0, size)) + ((0, 0),) * (x.ndim - 2))


def chunked(x: Array, chunk: int) -> Array:
  """B T H K -> N B H C K, with zeros behind."""
  return jnp.moveaxis(spans(x, chunk), 2, 3)


def unchunked(x: Array, size: int) -> Array:
  """N B H C K -> B T H K."""
  x = jnp.moveaxis(jnp.moveaxis(x, 3, 2), 0, 1)  # B N C H K
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :size]


def cut_out(x: Array, at: Any, size: int) -> Array:
  """B L ... -> B T ...: `size` tokens from the one at `at`.

  Numbers of 16 bits are moved as integers: XLA's CPU backend would turn the whole of a
  bfloat16 array into float32 first, for every span. The barrier keeps it from making
  integers of the whole array before the loop.
  """
  if size == x.shape[1]:
    return x
  if _coarse(x):
    x, at = jax.lax.optimization_barrier((x, at))
  found = jax.lax.dynamic_slice_in_dim(as_bits(x), at, size, axis=1)
  return as_number(found, x.dtype)


def put_in(x: Array, part: Array, at: Any) -> Array:
  """`x` with `part` from `at` on, both as bits."""
  return jax.lax.dynamic_update_slice_in_dim(x, as_bits(part), at, axis=1)


def as_bits(x: Array) -> Array:
  """Floats of 16 bits as integers; other arrays as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if _coarse(x) else x


def as_number(x: Array, dtype: Any) -> Array:
  """What `as_bits` was given, of this dtype."""
  return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _coarse(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
