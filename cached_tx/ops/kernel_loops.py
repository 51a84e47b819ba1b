"""How the steps of ops/favor_kernel.py are run: chunk after chunk, on a GPU or a TPU.

One step serves both. On a GPU (Triton) a program is a loop over chunks; on a TPU
(Mosaic) chunks are the last axis of the grid, and the sums an output that stays in
place.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cached_tx.ops.favor_causal import CallTokens

WARPS = 8  # of 32 threads: the sums of R K = 16,384 are 64 registers of each


class Laid(NamedTuple):
  """An array, with a letter for each axis: b, h and n are taken one by one."""

  axes: str
  array: Any  # or its shape


class Lay(NamedTuple):
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

  def heads(self, x: Array) -> Laid:
    """Of B L H K. A TPU wants tokens and width side by side."""
    if self.behind:
      x = jnp.pad(x, ((0, 0), (0, self.behind), (0, 0), (0, 0)))
    B, _, H, K = x.shape
    if self.platform == "gpu":
      return Laid("bnchk", x.reshape(B, self.chunks, self.chunk, H, K))
    return Laid(
      "bhnck", jnp.moveaxis(x, 2, 1).reshape(B, H, self.chunks, self.chunk, K)
    )

  def empty_heads(self, shape: Sequence[int], dtype: Any) -> Laid:
    """The shape of what `heads` makes of such an array."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    found = jax.eval_shape(lambda x: self.heads(x).array, x)
    return Laid("bnchk" if self.platform == "gpu" else "bhnck", found)

  def joined(self, x: Array) -> Array:
    """B L H K again."""
    if self.platform == "gpu":
      x = x.reshape(x.shape[0], -1, *x.shape[3:])
    else:
      x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 1, 2)
    return x[:, : self.length]

  def codes(self, tokens: CallTokens) -> Laid:
    """See `_weigh`. In float32, which holds them exactly and which a TPU can sum."""
    B = tokens.starts.shape[0]
    cut = lambda x: jnp.pad(x, ((0, 0), (0, self.behind))).reshape(
      B, self.chunks, 1, self.chunk
    )
    begun = jnp.cumsum(cut(tokens.starts), axis=-1)
    codes = jnp.where(cut(tokens.shown), begun, -1 - begun)
    return Laid("bn1c", codes.astype(jnp.float32))


def over_chunks(
  interpret: bool,
  platform: str,
  step: Callable[..., Any],
  given: list[Laid],
  rows: Laid,
  start: list[Laid],
  made: list[Laid],
  reverse: bool = False,
) -> tuple[Sequence[Array], Sequence[Array]]:
  """Runs step(given, rows, carry) -> (made, carry), chunk after chunk.

  Args:
    interpret: run by the interpreter.
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

  def spec(laid: Laid) -> pl.BlockSpec:
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
    Laid(x.axes, jax.ShapeDtypeStruct(x.array.shape, x.array.dtype)) for x in start
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
    interpret=interpret,
    name=f"favor{step.func.__name__}",  # type: ignore[attr-defined]
  )(*(x.array for x in inputs))
  return found[: len(made)], found[len(made) :]
