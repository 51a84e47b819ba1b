"""The fixed pattern of Sparse Transformers: Child et al., 2019, arXiv:1904.10509.

Here N counts blocks, of C tokens each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cached_tx.ops.banded import (
  Blocks,
  Keys,
  block_attention,
  check_size,
  cleared,
  in_blocks,
  joined,
)
from cached_tx.ops.bits import Drop
from cached_tx.types import Heads, Mask

QUERIES = 512  # whose scores are held at a time


def fixed_attention(
  q: Heads,
  k: Heads,
  v: Heads,
  valid: Mask,
  *,
  block: int,
  columns: Sequence[int],
  prefix: int = 0,
  drop: Drop | None = None,
) -> Heads:
  """A token sees its block up to itself, and some columns of every earlier block.

  The union of both patterns of section 4.3, one attention for all heads. Causal, as in
  the paper, but for a prefix.

  Args:
    q: any float dtype, already scaled by K ** -0.5.
    k, v: any float dtype; anything where tokens do not exist.
    valid: which tokens exist.
    block: C, l in the paper.
    columns: places in a block, from 0, whose tokens later blocks see; the last c of
      them in the paper.
    prefix: so many tokens at the row's beginning see all, and all see them. Blocks are
      counted from the token after them.
    drop: of the weights.

  Returns:
    As of `block_attention`. A query is scored with C + L c / C keys: time grows as
    L^1.5 where C grows as the root of c L, as L^2 where it is fixed. Scores of some 512
    queries at a time are held, in the backward pass too: memory is linear in L where C
    is fixed.

  Raises:
    ValueError: a size below its least, or a column outside of a block.
  """
  check_size("block", block)
  if prefix < 0:
    raise ValueError(f"prefix is {prefix}; it counts tokens, 0 or more")
  strange = [column for column in columns if not 0 <= column < block]
  if strange:
    raise ValueError(f"column {strange[0]} is outside of a block of {block}")
  first = min(prefix, q.shape[1])
  k, v = cleared(k, valid), cleared(v, valid)
  rest = q.shape[1] - first
  outs, parts = [], []
  if first:
    parts = [Keys(k[:, :first], v[:, :first], valid[:, None, None, None, :first])]
    seen = [Keys(k, v, valid[:, None, None, None])]
    outs.append(block_attention(q[:, None, :first], seen, drop)[:, 0])
  if rest:
    queries, keys, values = (in_blocks(x[:, first:], block) for x in (q, k, v))
    real = in_blocks(valid[:, first:], block)  # B N C
    own = drop and drop._replace(key=jax.random.fold_in(drop.key, 1))
    summary = _summary(keys, values, real, sorted(set(columns)))
    found = _by_groups(queries, keys, values, real, parts, summary, own)
    outs.append(joined(found, rest))
  return jnp.concatenate(outs, axis=1)


class _Summary(NamedTuple):
  """What later blocks see of each block: c columns of it."""

  k: Float[Array, "B S H K"]
  v: Float[Array, "B S H K"]
  real: Bool[Array, "B S"]
  block: Int[Array, "S"]


def _summary(
  keys: Blocks, values: Blocks, real: Bool[Array, "B N C"], columns: list[int]
) -> _Summary | None:
  if not columns or real.shape[1] == 1:
    return None
  at = jnp.asarray(columns)
  pick = lambda x: x[:, :, at].reshape(len(x), -1, *x.shape[3:])
  block = jnp.repeat(jnp.arange(real.shape[1]), len(columns))
  return _Summary(pick(keys), pick(values), pick(real), block)


def _by_groups(
  queries: Blocks,
  keys: Blocks,
  values: Blocks,
  real: Bool[Array, "B N C"],
  parts: list[Keys],
  summary: _Summary | None,
  drop: Drop | None,
) -> Blocks:
  """Attention of all blocks, some of them at a time."""
  N, C = real.shape[1:]
  size = max(1, QUERIES // C)
  if size >= N:
    numbers = jnp.arange(N)
    return _attended(queries, keys, values, real, numbers, parts, summary, drop)
  count = -(-N // size)

  def cut(x: Array) -> Array:
    """B N ... -> groups B size ..., with zeros behind."""
    x = jnp.pad(x, ((0, 0), (0, count * size - N), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def group(now: tuple[Any, ...]) -> Blocks:
    number, queries, keys, values, real = now
    own = drop and drop._replace(key=jax.random.fold_in(drop.key, number))
    numbers = number * size + jnp.arange(size)
    return _attended(queries, keys, values, real, numbers, parts, summary, own)

  blocks = [cut(x) for x in (queries, keys, values, real)]
  found = jnp.moveaxis(jax.lax.map(group, (jnp.arange(count), *blocks)), 0, 1)
  return found.reshape(len(found), count * size, *found.shape[3:])[:, :N]


def _attended(
  queries: Blocks,
  keys: Blocks,
  values: Blocks,
  real: Bool[Array, "B N C"],
  numbers: Int[Array, "N"],
  parts: list[Keys],
  summary: _Summary | None,
  drop: Drop | None,
) -> Blocks:
  """Of the prefix, the block up to the query, and columns of earlier blocks."""
  within = jnp.arange(real.shape[2])
  own = within[None] <= within[:, None]  # C C
  shown = own[None, None, None] & real[:, None, :, None]
  parts = [*parts, Keys(keys, values, shown)]
  if summary is not None:
    earlier = numbers[:, None] > summary.block[None]  # N S
    shown = earlier[None, None, :, None] & summary.real[:, None, None, None]
    parts.append(Keys(summary.k, summary.v, shown))
  return block_attention(queries, parts, drop)
