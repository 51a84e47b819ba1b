"""Where attention goes: Rae et al., 2019, arXiv:1911.05507, section 5.5."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def slices(sizes: Sequence[int], parts: int) -> list[int]:
  """How many keys each slice has, region by region, the oldest first.

  Args:
    sizes: keys of each region.
    parts: slices of a region, all equal; where `parts` does not divide its size, the
      last one takes the rest.
  """
  equal = [[size // parts] * (parts - 1) for size in sizes]
  pairs = zip(sizes, equal, strict=True)
  return [n for size, own in pairs for n in (*own, size - sum(own))]


def buckets(
  received: Float[Array, "*lead S"], sizes: Sequence[int], parts: int = 6
) -> Float[Array, "*lead slices"]:
  """Attention by age: each region of keys in equal slices, the oldest first.

  The figure of the paper has 18: compressed slots, recent tokens and the sequence,
  each in 6, averaged over layers.

  Args:
    received: attention that each key received: weights after the softmax, averaged
      over heads and queries. Sums to 1 over the keys, and so do the slices.
    sizes: keys of each region, in their order; together S.
    parts: see `slices`.

  Returns:
    The sum within each slice.

  Raises:
    ValueError: if the sizes do not sum to S.
  """
  if sum(sizes) != received.shape[-1]:
    raise ValueError(
      f"sizes are {sizes}, together {sum(sizes)}, but there are "
      f"{received.shape[-1]} keys"
    )
  edges = itertools.pairwise(itertools.accumulate(slices(sizes, parts), initial=0))
  return jnp.stack([received[..., a:b].sum(axis=-1) for a, b in edges], axis=-1)
