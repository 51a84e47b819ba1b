"""Positions as functions of distance: rotary angles and Transformer-XL's terms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cached_tx.types import Heads

POSITIONS = ("rotary", "relative", "none")


def rotary_angles(positions: Int[Array, "..."], width: int) -> Float[Array, "... A"]:
  """Angles in radians, one for each of the A = width / 2 planes.

  Su et al., 2021, arXiv:2104.09864, section 3.2.2. The turn of a plane per
  position is held in units of 2**-32 turns and multiplied in uint32, which wraps
  as angles do: the difference of two angles depends on the distance alone, to the
  last bit, however long the stream. The frequency is off by at most 2**-33 turns.
  """
  planes = np.arange(width // 2) / (width // 2)
  turns = 10_000.0**-planes / (2 * np.pi)
  step = np.round(turns * 2.0**32).astype(np.uint32)
  turned = positions.astype(jnp.uint32)[..., None] * jnp.asarray(step).reshape(
    (1,) * positions.ndim + (-1,)
  )
  signed = jax.lax.bitcast_convert_type(turned, jnp.int32)  # half a turn either way
  exact = jax.dtypes.canonicalize_dtype(jnp.float64)
  return signed.astype(exact) * (2 * np.pi / 2.0**32)


def rotate(x: Heads, positions: Int[Array, "#B L"]) -> Heads:
  """Turns each pair of channels of `x` by its position's angle."""
  angles = rotary_angles(positions, x.shape[-1])[:, :, None]  # B L 1 A
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def sinusoids(distances: Int[Array, "W"], width: int) -> Float[Array, "W D"]:
  """Dai et al., 2019, arXiv:1901.02860, R: sines, then cosines, of the distances."""
  planes = np.arange(0, width, 2) / width
  angles = distances[:, None] * jnp.asarray(10_000.0**-planes)[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def distance_table(keys: int, width: int, farthest: int = 0) -> Float[Array, "S D"]:
  """Sinusoids of the distances S - 1 to 0 of S keys, none above `farthest` (0: any)."""
  distances = jnp.arange(keys - 1, -1, -1, dtype=jnp.int32)
  if farthest:
    distances = jnp.minimum(distances, farthest)
  return sinusoids(distances, width)


def distance_scores(
  q: Heads,
  r: Float[Array, "W H K"],
  place: Int[Array, "#B Q"] | None,
  keys: int,
) -> Float[Array, "B H Q S"]:
  """Dai et al.'s terms (b) and (d): products of queries and projected distances.

  Args:
    q: scaled, with the bias v.
    r: of the distances W - 1 to 0, as of `distance_table`.
    place: where each query stands, counted from the first key; None: at the last Q of
      W places, which needs no gather.
    keys: S, how many of the first of the W keys are attended.

  Returns:
    Scores in float32 at least; what they are of later keys means nothing.
  """
  W = r.shape[0]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  # One product for each head, of all rows: its result leads with heads.
  scores = jnp.einsum("bqhk,whk->hbqw", q, r, preferred_element_type=wide)
  if place is None:
    return jnp.swapaxes(by_key(scores), 0, 1)[..., :keys]
  scores = jnp.swapaxes(scores, 0, 1)
  distance = place[:, :, None] - jnp.arange(keys, dtype=jnp.int32)[None, None]
  column = jnp.clip(W - 1 - distance, 0, W - 1)[:, None]  # B 1 Q S
  column = jnp.broadcast_to(column, (*scores.shape[:3], keys))
  return jnp.take_along_axis(scores, column, axis=3)


@jax.custom_jvp
def by_key(scores: Float[Array, "*batch Q S"]) -> Float[Array, "*batch Q S"]:
  """Turns scores by distance into scores by key, for queries at the last Q places.

  Column w of the input is distance S - 1 - w, and S the number of keys. What lies
  after a query is 0, and its gradient is dropped. Nothing is computed: the table is
  padded to its full length for the negative distances, so that no entry wraps around
  from another row, and read from other places.
  """
  *batch, Q, S = scores.shape  # padded by one more at least, for one query too
  full = jnp.pad(scores, [(0, 0)] * len(batch) + [(0, 0), (0, Q)])
  return by_place(full, S)


def by_place(x: Float[Array, "*batch n w"], keys: int) -> Float[Array, "*batch n s"]:
  """The columns n - 1 - a and on of row a, without a gather."""
  *batch, n, w = x.shape
  flat = x.reshape(*batch, n * w)[..., n - 1 : n - 1 + n * (w - 1)]
  return flat.reshape(*batch, n, w - 1)[..., :keys]


def sliced(slopes: Float[Array, "*batch Q S"]) -> Float[Array, "*batch Q S"]:
  """Turns what is by key to what is by distance, row by row: the way of gradients.

  Row q begins with the Q - 1 - q distances that it does not reach: 0. What it has of
  later keys is dropped.
  """
  *batch, Q, S = slopes.shape
  full = jnp.pad(slopes, [(0, 0)] * len(batch) + [(0, 0), (Q - 1, 0)])
  take = lambda row, begin: jax.lax.dynamic_slice_in_dim(row, begin, S, axis=-1)
  return jax.vmap(take, in_axes=(-2, 0), out_axes=-2)(full, jnp.arange(Q))


def flattened(slopes: Float[Array, "*batch Q S"]) -> Float[Array, "*batch Q S"]:
  """The same without a gather: a row longer by one moves what follows it by one."""
  *batch, Q, S = slopes.shape
  by_row = [(0, 0)] * len(batch)
  full = jnp.pad(slopes, [*by_row, (0, 0), (0, Q - 1)])
  flat = jnp.pad(full.reshape(*batch, Q * (S + Q - 1)), [*by_row, (Q - 1, 1)])
  return flat.reshape(*batch, Q, S + Q)[..., :S]


@by_key.defjvp
def _tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
  """The tangent, which moves as the scores do, written so that gradients take a way.

  On a CPU slices are copies of rows, and a fifth of an attention's time is saved.
  """
  (scores,), (tangent,) = primals, tangents

  def turned(way: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda t: jax.linear_transpose(way, t)(t)[0]

  moved = jax.lax.platform_dependent(
    tangent, cpu=turned(sliced), default=turned(flattened)
  )
  return by_key(jnp.asarray(scores)), moved
