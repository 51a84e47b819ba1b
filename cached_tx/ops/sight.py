"""Which keys a query sees, told by arrays that grow with queries and keys alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Range = tuple[int, int, int, int]


class Sight(NamedTuple):
  """Hides keys from queries; what is None hides nothing.

  Attributes:
    query_documents, key_documents: a query sees the keys of its own document. Both
      are given, or none.
    key_valid: False for a key that nobody sees.
    query_places, key_places: where each stands, where that is not one after the other.
    zeros: for each query the first place, and the one after the last, of the keys that
      count for it as zero tokens: they are seen whatever the document and validity,
      their product with the query and their value are 0.
  """

  query_documents: Int[Array, "#B Q"] | None = None
  key_documents: Int[Array, "#B S"] | None = None
  key_valid: Bool[Array, "#B S"] | None = None
  query_places: Int[Array, "#B Q"] | None = None
  key_places: Int[Array, "#B S"] | None = None
  zeros: Int[Array, "#B Q 2"] | None = None

  @property
  def placed(self) -> bool:
    """Whether places are arrays, so that nothing is known of them beforehand."""
    return self.query_places is not None or self.key_places is not None


EVERYTHING = Sight()


class Grid(NamedTuple):
  """Blocks of queries and keys, and what is known of places beforehand.

  Attributes:
    queries, keys: Q and S.
    rows, columns: queries and keys of a block.
    offset: place of the first query, of the first key being 0.
    causal: a query sees no key whose place is after its own.
    window: how many places a query sees, with its own; 0: any number.
  """

  queries: int
  keys: int
  rows: int
  columns: int
  offset: int
  causal: bool
  window: int

  @property
  def high(self) -> int:
    """Blocks of queries."""
    return -(-self.queries // self.rows)

  @property
  def wide(self) -> int:
    """Blocks of keys."""
    return -(-self.keys // self.columns)


class Hidden(NamedTuple):
  """What hides keys, padded to whole blocks."""

  sight: Sight
  mask: Bool[Array, "B Q S"] | None


def hidden(grid: Grid, sight: Sight, mask: Bool[Array, "B Q S"] | None) -> Hidden:
  """Pads what hides keys; `seen` knows what is padding."""
  rows, columns = grid.rows, grid.columns
  sizes = (rows, columns, columns, rows, columns, rows)
  sight = Sight(*(padded(x, n, 1) for x, n in zip(sight, sizes, strict=True)))
  return Hidden(sight, padded(padded(mask, rows, 1), columns, 2))


def padded(x: Any, n: int, axis: int) -> Any:
  """`x` with 0, or its last entry again, until the axis has a multiple of `n`."""
  if x is None or not x.shape[axis] % n:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % n)
  mode = "constant" if jnp.issubdtype(x.dtype, jnp.inexact) else "edge"
  return jnp.pad(x, pad, mode=mode)


def block(x: Any, i: int | Array, n: int, axis: int) -> Any:
  """Block `i` of `n` entries of an axis."""
  if x is None or x.shape[axis] == n:
    return x
  return jax.lax.dynamic_slice_in_dim(x, i * n, n, axis)


def ranges(grid: Grid, own: Hidden) -> tuple[Range, ...]:
  """Of each block of queries the blocks of keys that places let it see.

  Returns:
    Four numbers b <= c <= d <= e for each: blocks b to e - 1 are seen, at least in
    part, and c to d - 1 of them by all of its queries in full.
  """
  arrays = own.mask is not None or any(x is not None for x in own.sight)
  out = []
  for i in range(grid.high):
    near = grid.offset + i * grid.rows
    far = grid.offset + min((i + 1) * grid.rows, grid.queries) - 1
    begin, end, first, last = 0, grid.wide, 0, grid.keys // grid.columns
    if grid.causal and not own.sight.placed:
      end = min(end, far // grid.columns + 1)
      last = min(last, (near + 1) // grid.columns)
    if grid.window and not own.sight.placed:
      begin = min(max(0, near - grid.window + 1) // grid.columns, end)
      first = -(-max(0, far - grid.window + 1) // grid.columns)
    first = end if arrays else min(max(first, begin), end)
    out.append((begin, first, min(max(last, first), end), end))
  return tuple(out)


def shown(
  sight: Sight, queries: int, keys: int, *, causal: bool = True, window: int = 0
) -> tuple[Bool[Array, "#B Q S"], Bool[Array, "#B Q S"] | None]:
  """Which keys all queries see, and which count as zeros; the queries stand last."""
  grid = Grid(queries, keys, queries, keys, keys - queries, causal, window)
  return seen(grid, Hidden(sight, None), 0, 0)


def bounds(grid: Grid, known: tuple[Range, ...], own: Hidden) -> Int[Array, "blocks 4"]:
  """The ranges, without the blocks at both ends that documents or the mask hide."""
  table = np.asarray(known, np.int32)
  sight, mask = own
  asked, told = sight.query_documents, sight.key_documents
  if sight.zeros is not None or (mask is None and asked is None):
    return jnp.asarray(table)
  begin, end = table[:, :1], table[:, 3:]
  places = np.arange(grid.wide)[None]
  some = jnp.asarray((begin <= places) & (places < end))
  if mask is not None:
    cut = (len(mask), grid.high, grid.rows, grid.wide, grid.columns)
    some = some & mask.reshape(cut).any(axis=(0, 2, 4))
  if asked is not None and told is not None:
    asked = asked.reshape(-1, grid.high, 1, grid.rows)
    told = told.reshape(-1, 1, grid.wide, grid.columns)
    near = (asked.min(-1) <= told.max(-1)) & (told.min(-1) <= asked.max(-1))
    some = some & near.any(axis=0)
  first = jnp.argmax(some, axis=1)
  last = jnp.where(
    some.any(axis=1), grid.wide - jnp.argmax(some[:, ::-1], axis=1), first
  )
  return jnp.stack([first, last, last, last], axis=1).astype(jnp.int32)


def seen(
  grid: Grid, own: Hidden, i: int | Array, j: int | Array
) -> tuple[Bool[Array, "#B n s"], Bool[Array, "#B n s"] | None]:
  """Which keys of block j the queries of block i see, and which count as zeros."""
  sight, mask = own
  rows, columns = grid.rows, grid.columns
  query = lambda x: block(x, i, rows, 1)[:, :, None]
  key = lambda x: block(x, j, columns, 1)[:, None]
  row = i * rows + jnp.arange(rows, dtype=jnp.int32)[None, :, None]
  column = j * columns + jnp.arange(columns, dtype=jnp.int32)[None, None]
  here = grid.offset + row if sight.query_places is None else query(sight.query_places)
  there = column if sight.key_places is None else key(sight.key_places)
  shown = jnp.ones((1, rows, columns), bool)
  if sight.query_documents is not None:
    shown = shown & (query(sight.query_documents) == key(sight.key_documents))
  if sight.key_valid is not None:
    shown = shown & key(sight.key_valid)
  if mask is not None:
    shown = shown & block(block(mask, i, rows, 1), j, columns, 2)
  zeros = None
  if sight.zeros is not None:
    interval = query(sight.zeros)  # B n 1 2
    zeros = (there >= interval[..., 0]) & (there < interval[..., 1])
    shown = shown | zeros
  if grid.causal:
    shown = shown & (there <= here)
  if grid.window:
    shown = shown & (here - there < grid.window)
  if grid.queries % rows:
    shown = shown & (row < grid.queries)
  if grid.keys % columns:
    shown = shown & (column < grid.keys)
  return shown, zeros
