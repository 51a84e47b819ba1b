"""Shorter rows of tokens from longer ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cached_tx.types import Hidden, Index, Mask


def nearest(
  x: Hidden, first: Index, length: Index, slots: int
) -> Float[Array, "B M D"]:
  """M tokens of the `length` tokens of each row from `first` on: floor(i length / M).

  Zhang et al., 2024, arXiv:2312.12742 interpolate valid tokens only, by the index
  rule of `nearest` in the authors' framework (not the half-pixel rule). A row of
  length 0 gets the token at `first`, which the caller masks.
  """
  i = jnp.arange(slots, dtype=first.dtype)[None]
  return _taken(x, first[:, None] + i * length[:, None] // slots)


def nearest_valid(x: Hidden, valid: Mask, slots: int) -> Float[Array, "B M D"]:
  """M of the valid tokens of each row, wherever they stand: the rule of `nearest`.

  A row without valid tokens gets its first one, which the caller masks.
  """
  order = jnp.argsort(~valid, axis=1, stable=True)  # the valid ones first, in order
  length = valid.sum(axis=1, dtype=jnp.int32)
  places = jnp.arange(slots, dtype=jnp.int32)[None] * length[:, None] // slots
  return _taken(x, jnp.take_along_axis(order, places, axis=1))


@jax.custom_jvp
def _taken(x: Hidden, places: Int[Array, "B M"]) -> Float[Array, "B M D"]:
  """The tokens at these places of each row."""
  return jnp.take_along_axis(x, places[..., None], axis=1)


@_taken.defjvp
def _tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
  """As a product, whose transpose is one: a scatter is a loop on a CPU."""
  (x, places), (tangent, _) = primals, tangents
  tokens = jnp.arange(x.shape[1], dtype=places.dtype)
  one = (places[:, None] == tokens[None, :, None]).astype(x.dtype)  # B L M
  moved = jnp.einsum("blm,bld->bmd", one, tangent, precision=jax.lax.Precision.HIGHEST)
  return _taken(x, places), moved


def blocks(x: Shaped[Array, "B L D"], rate: int) -> Shaped[Array, "B M rate D"]:
  """Cuts L = M rate tokens into M blocks of `rate` neighbours."""
  B, L, D = x.shape
  return x.reshape(B, L // rate, rate, D)
