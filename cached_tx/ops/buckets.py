"""Where attention goes: Rae et al., 2019, arXiv:1911.05507, section 5.5."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float


def buckets(
  received: Float[Array, "B S"], sizes: tuple[int, ...], parts: int = 6
) -> Float[Array, "slices"]:
  """Attention by age: each region of keys in equal slices, the oldest first.

  The figure of the paper has 18: compressed slots, recent tokens and the sequence,
  each in 6, averaged over layers.

  Args:
    received: attention that each key received: weights after the softmax, averaged
      over heads and queries. Rows sum to 1, and so do the slices.
    sizes: keys of each region, in their order; together S. Where `parts` does not
      divide one, its last slice takes the rest.
    parts: slices of a region.

  Returns:
    The sum within each slice, averaged over rows.

  Raises:
    ValueError: if the sizes do not sum to S.
  """
  if sum(sizes) != received.shape[-1]:
    raise ValueError(
      f"sizes are {sizes}, together {sum(sizes)}, but there are "
      f"{received.shape[-1]} keys"
    )
  each = received.mean(axis=0)
  found, first = [], 0
  for size in sizes:
    ends = [first + i * (size // parts) for i in range(parts)] + [first + size]
    found += [each[a:b].sum() for a, b in itertools.pairwise(ends)]
    first += size
  return jnp.stack(found)
