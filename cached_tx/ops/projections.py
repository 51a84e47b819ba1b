"""Random rows w_r for feature maps, drawn by an explicit key.

Choromanski et al., 2021, arXiv:2009.14794, sections 2.4 and 3. M rows of width K. For
iid and orthogonal rows each w_r is N(0, I), so that estimates of the softmax kernel are
unbiased. Regularised rows, of length sqrt(K), estimate a kernel that is smaller (SMREG,
Theorem 1) with less variance; Hadamard rows have that length too and estimate nearly
the same kernel.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Rows = Float[Array, "M K"]
Drawn = TypeVar("Drawn")


def project(kind: str, key: Array, features: int, width: int) -> Rows:
  """M = `features` rows of width K = `width`, in float32.

  Args:
    kind: one of `PROJECTIONS`.
    key: equal keys give equal rows. Those of layers and of redraws are made by
      `jax.random.fold_in`.
    features: M, any number; the last block of K rows may be cut short.
    width: K; of hadamard a power of two.

  Raises:
    ValueError: an unknown kind, no rows, or a width that the kind cannot have.
  """
  if kind not in PROJECTIONS:
    raise ValueError(f"kind is {kind!r}; one of {', '.join(PROJECTIONS)}")
  if features < 1:
    raise ValueError(f"features is {features}; it counts rows: 1 or more")
  return PROJECTIONS[kind](key, features, width)


def iid(key: Array, features: int, width: int) -> Rows:
  """Independent rows, each N(0, I)."""
  return jax.random.normal(key, (features, width), jnp.float32)


def orthogonal(key: Array, features: int, width: int) -> Rows:
  """Rows that are orthogonal within a block of K, each N(0, I) by itself.

  Haar directions times the lengths of independent Gaussian rows. Lowers the error of
  positive features at any K (Theorem 2).
  """
  directions, lengths = jax.random.split(key)
  gaussian = jax.random.normal(lengths, (features, width), jnp.float32)
  norms = jnp.linalg.norm(gaussian, axis=-1, keepdims=True)
  return _directions(directions, features, width) * norms


def regularised(key: Array, features: int, width: int) -> Rows:
  """The directions that `orthogonal` has for this key, all of length sqrt(K).

  The estimated kernel is SMREG <= SM; their ratio is at least 1 - 2 / K^(1/3), up to
  lower orders (Theorem 1).
  """
  directions, _ = jax.random.split(key)
  return _directions(directions, features, width) * width**0.5


def hadamard(key: Array, features: int, width: int) -> Rows:
  """Blocks sqrt(K) H D1 H D2 H D3, orthogonal, all of length sqrt(K).

  H is the normalised Hadamard matrix, each D a diagonal of independent signs: 3K random
  bits a block instead of K^2 Gaussians and a QR. A coordinate has the moments 0, 1 and
  3 - 2 (3K - 2) / K^2 for orders 1, 2 and 4, of which those of `regularised` are 0, 1
  and 3 - 6 / (K + 2). Exact in float32 for K < 4096: integers, divided by K.

  Raises:
    ValueError: K is no power of two.
  """
  if width < 1 or width & (width - 1):
    raise ValueError(
      f"width is {width}, but 'hadamard' rows are made of Hadamard matrices, whose "
      "widths here are powers of two: choose another width of heads, or another "
      "projection: orthogonal or regularised"
    )
  H = jnp.asarray(_hadamard_matrix(width))
  blocks = -(-features // width)
  half = jnp.float32(0.5)  # by its dtype the draw is the same where 64 bits are enabled
  signs = (
    2 * jax.random.bernoulli(key, half, (blocks, 3, width)).astype(jnp.float32) - 1
  )
  product = H[None]  # all of it times K^1.5
  for i in range(3):
    product = product * signs[:, i, None]
    if i < 2:
      product = jnp.einsum("nij,jk->nik", product, H, precision="highest")
  return (product / width).reshape(blocks * width, width)[:features]


def _directions(key: Array, features: int, width: int) -> Rows:
  """Unit rows of Haar-distributed matrices, K of each.

  The signs of the QR factor are fixed, as in Mezzadri, 2007, arXiv:math-ph/0609050.
  Without that the diagonal has mean -0.2 (at K = 16) and estimates have a bias.
  """
  blocks = -(-features // width)
  square = jax.random.orthogonal(key, width, (blocks,), jnp.float32)
  return square.reshape(blocks * width, width)[:features]


def _hadamard_matrix(width: int) -> Float[np.ndarray, "K K"]:
  """Sylvester's: entries 1 and -1, row i and column j agree in sign by |i & j|."""
  index = np.arange(width)
  ones = np.bitwise_count(index[:, None] & index[None])
  return np.where(ones % 2, -1, 1).astype(np.float32)


PROJECTIONS: dict[str, Callable[[Array, int, int], Rows]] = {
  "iid": iid,
  "orthogonal": orthogonal,
  "regularised": regularised,
  "hadamard": hadamard,
}


def seeded(seed: int) -> Array:
  """A key whose numbers no setting of JAX changes: a seed stands for its rows."""
  return jax.random.key(seed, impl="threefry2x32")


def constant(make: Callable[[], Drawn]) -> Drawn:
  """What `make` draws, arrays or None, as constants of the program that is traced.

  In the program, factorisations of several layers at once wait for one another for ever
  on a CPU of two cores (seen with JAX 0.10). Where several processes run the program,
  whose constants cannot be read here, it is drawn in the program all the same.

  Args:
    make: of no traced value.
  """
  if jax.process_count() > 1:
    return make()
  with jax.ensure_compile_time_eval():
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), make())
