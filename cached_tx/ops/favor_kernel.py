"""Causal FAVOR+ with positive features as one kernel, forward and backward.

The mathematics is that of ops/sums.py. A program goes over the chunks of one row and
head in turn, the sums being its carry, and makes features where they are used: none of
the R numbers per token is written to memory. Three loops are needed: forward; forward
again for the cotangents of queries, which need the sums before; backward for those of
keys and values, which need the cotangent of the sums after. None keeps sums by chunk.

The steps of these loops are in ops/kernel_steps.py, and how they are run, on a GPU and
on a TPU, in ops/kernel_loops.py.

Compiled for both, and run on neither yet: see docs/performers.md.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cached_tx.ops.favor_causal import CallTokens
from cached_tx.ops.features import FEATURES, FeatureMap
from cached_tx.ops.kernel_loops import Laid, Lay, over_chunks
from cached_tx.ops.kernel_steps import attend, products_of, pull_keys, pull_queries
from cached_tx.ops.projections import Rows
from cached_tx.ops.sums import PrefixSums
from cached_tx.types import Heads, Segment

# Kinds of devices on which the kernel was seen to be right and faster than the scans.
FASTER: frozenset[str] = frozenset()
PLATFORMS = ("gpu", "tpu")
SMALLEST = 16  # of the sides of a product on a GPU


def chosen(device_kind: str) -> bool:
  """Whether the kernel is taken unasked on such a device."""
  return device_kind in FASTER


def misfit(
  features: FeatureMap, w: Rows | None, chunk: int, width: int, values: int
) -> str | None:
  """Why the kernel cannot do this, if it cannot.

  Args:
    features, w, chunk: as of `favor_kernel`.
    width: K.
    values: Kv.
  """
  if features != FEATURES["positive"] or w is None:
    return "the kernel makes positive features of a projection, and none other"
  sizes = {"chunk": chunk, "R": w.shape[0], "K": width, "the width of v": values}
  for name, size in sizes.items():
    if size < SMALLEST or size & (size - 1):
      return (
        f"{name} is {size}; the kernel multiplies blocks whose sides are powers of "
        f"two, {SMALLEST} or more"
      )
  return None


def favor_kernel(
  q: Heads,
  k: Heads,
  v: Float[Array, "B L H Kv"],
  w: Rows | None,
  segment: Segment,
  sums: PrefixSums,
  *,
  features: FeatureMap = FEATURES["positive"],
  chunk: int = 64,
  interpret: bool = False,
  platform: str | None = None,
) -> tuple[Float[Array, "B L H Kv"], PrefixSums]:
  """Causal attention as `favor_attention` has it, by a kernel.

  Memory beyond arguments and results is one number per token and head and one per
  chunk and head, besides q, k and v with their axes exchanged on a TPU.

  Args:
    q, k: any float dtype, both already scaled by K ** -0.25. w . q and w . k are
      computed in full float32; where both are bfloat16, by three products with parts
      of w, which sum to it.
    v: any float dtype; sets the dtype of the output. Float32 is multiplied in full
      precision; with coarser values the factors of products, features and sums among
      them, are rounded to their dtype. All is added up in float32.
    w: projection.
    segment: document starts and valid tokens of the L positions.
    sums: sums over the earlier keys of each row's document.
    features: positive ones only.
    chunk: tokens per step. R, K, Kv and it are powers of two, 16 or more; L is any.
    interpret: run by JAX's interpreter of kernels, for tests: slow, on any device, in
      float64 too.
    platform: gpu or tpu, whose way to run the steps is taken. None: where it runs, and
      gpu if interpreted.

  Returns:
    As `favor_attention`, gradients included; second derivatives there are none.

  Raises:
    ValueError: for other features, sizes that do not fit, and sums of other features.
  """
  why = misfit(features, w, chunk, q.shape[-1], v.shape[-1])
  if w is None or why is not None:
    raise ValueError(f"{why}: use the associative form or the scan")
  R = w.shape[0]
  if sums.values.shape[2:] != (R, v.shape[-1]):
    raise ValueError(
      f"sums are of {sums.values.shape[2]} features and values {sums.values.shape[3]} "
      f"wide, but there are {R} features and values {v.shape[-1]} wide"
    )
  if platform is not None and platform not in PLATFORMS:
    raise ValueError(
      f"platform is {platform!r}; one of {', '.join(PLATFORMS)}, or None"
    )
  if interpret and platform is None:
    platform = "gpu"
  dtype = sums.values.dtype
  wide = jnp.promote_types(jnp.result_type(q, k, v), dtype)
  tokens = CallTokens(q, k, v, segment.starts & segment.real, segment.real)
  before = jax.tree.map(lambda x: x.astype(wide), sums)
  before = before._replace(top=jax.lax.stop_gradient(before.top))
  how = _How(chunk, interpret, platform)
  out, after = _causal(how, tokens, jax.lax.stop_gradient(w), before)
  return out, jax.tree.map(lambda x: x.astype(dtype), after)


class _How(NamedTuple):
  """What is known before anything runs."""

  chunk: int
  interpret: bool
  platform: str | None


class _Saved(NamedTuple):
  """What the forward pass leaves besides its arguments and results."""

  below: Float[Array, "B H N 1 C"]  # denominators; infinite where no gradient can go
  tops: Float[Array, "B H N 1 1"]  # mu before every chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(
  how: _How, tokens: CallTokens, w: Rows, sums: PrefixSums
) -> tuple[Array, PrefixSums]:
  out, after, _ = _forward(how, tokens, w, sums)
  return out, after


def _causal_forward(how, tokens, w, sums):
  out, after, saved = _forward(how, tokens, w, sums)
  return (out, after), (tokens, w, sums, out, saved)


def _causal_backward(how, kept, cotangents):
  tokens, w, sums, out, saved = kept
  slope, after = cotangents
  q, k, v, values, keys = _backward(how, tokens, w, sums, out, saved, slope, after)
  flags: Any = [np.zeros(x.shape, jax.dtypes.float0) for x in tokens[3:]]
  before = PrefixSums(values, keys, jnp.zeros_like(sums.top))
  return CallTokens(q, k, v, *flags), jnp.zeros_like(w), before


_causal.defvjp(_causal_forward, _causal_backward)


def _forward(
  how: _How, tokens: CallTokens, w: Rows, sums: PrefixSums
) -> tuple[Array, PrefixSums, _Saved]:
  B, L, H, _ = tokens.v.shape
  wide = sums.values.dtype
  step = functools.partial(attend, products_of(tokens.v), wide)

  def run(platform, tokens, w, sums):
    lay = Lay(platform, how.chunk, L)
    given = [*(lay.heads(x) for x in tokens[:3]), lay.codes(tokens)]
    made = [
      lay.empty_heads(tokens.v.shape, tokens.v.dtype),
      Laid("bhn1c", jax.ShapeDtypeStruct((B, H, lay.chunks, 1, how.chunk), wide)),
      Laid("bhn11", jax.ShapeDtypeStruct((B, H, lay.chunks, 1, 1), wide)),
    ]
    (out, below, tops), ends = over_chunks(
      how.interpret, platform, step, given, _parts(tokens, w, wide), _carry(sums), made
    )
    after = PrefixSums(ends[0], ends[1][:, :, 0], ends[2][:, :, 0, 0])
    return lay.joined(out), after, _Saved(below, tops)

  return _by_platform(how, run, tokens, w, sums)


def _backward(
  how: _How,
  tokens: CallTokens,
  w: Rows,
  sums: PrefixSums,
  out: Array,
  saved: _Saved,
  slope: Array,
  after: PrefixSums,
) -> tuple[Array, ...]:
  """Cotangents of q, k, v, and of the sums' values and keys."""
  L = tokens.q.shape[1]
  wide = sums.values.dtype
  products = products_of(tokens.v)

  def run(platform, tokens, w, sums, out, saved, slope, after):
    lay = Lay(platform, how.chunk, L)
    given = [*(lay.heads(x) for x in tokens[:3]), lay.codes(tokens)]
    given += [Laid("bhn11", saved.tops), Laid("bhn1c", saved.below)]
    given += [lay.heads(slope), lay.heads(out)]
    rows = _parts(tokens, w, wide)
    empty = lambda x: lay.empty_heads(x.shape, x.dtype)
    step = functools.partial(pull_queries, products, wide)
    (q,), _ = over_chunks(
      how.interpret, platform, step, given, rows, _carry(sums)[:2], [empty(tokens.q)]
    )
    step = functools.partial(pull_keys, products, wide)
    made = [empty(tokens.k), empty(tokens.v)]
    (k, v), ends = over_chunks(
      how.interpret, platform, step, given, rows, _carry(after)[:2], made, reverse=True
    )
    return *map(lay.joined, (q, k, v)), ends[0], ends[1][:, :, 0]

  return _by_platform(how, run, tokens, w, sums, out, saved, slope, after)


def _parts(tokens: CallTokens, w: Rows, wide: Any) -> Laid:
  """w, or three parts of 8 bits that sum to it: products with bfloat16 are exact."""
  w = w.astype(wide)
  if {tokens.q.dtype, tokens.k.dtype} != {jnp.dtype(jnp.bfloat16)} or wide != "float32":
    return Laid("prk", w[None])
  parts = []
  for _ in range(3):
    # Not by a cast to bfloat16 and back, which XLA may leave out.
    parts.append(jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7))
    w = w - parts[-1]
  return Laid("prk", jnp.stack(parts).astype(jnp.bfloat16))


def _carry(sums: PrefixSums) -> list[Laid]:
  return [
    Laid("bhrk", sums.values),
    Laid("bh1r", sums.keys[:, :, None]),
    Laid("bh11", sums.top[:, :, None, None]),
  ]


def _by_platform(how: _How, run: Callable[..., Any], *args: Any) -> Any:
  if how.platform is not None:
    return run(how.platform, *args)
  # On any other platform JAX says that there is only its interpreter.
  gpu, tpu = (functools.partial(run, platform) for platform in PLATFORMS)
  return jax.lax.platform_dependent(*args, tpu=tpu, default=gpu)
