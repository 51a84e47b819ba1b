"""Feature maps phi of linear attention: phi(q) . phi(k) stands for a kernel of q and k.

Choromanski et al., 2021, arXiv:2009.14794. Of w_r ~ N(0, I) the positive, hyperbolic
(Lemma 1) and trigonometric (section 2.3) maps estimate the softmax kernel without bias,

  E[phi(x) . phi(y)] = exp(x . y);

generalised maps f(w_r . x) + epsilon (section 2.2) stand for kernels of their own. With
M rows of width K a map has R features. Features of the softmax kernel overflow where x
is long, so that each map is returned as a value of moderate size and a logarithm.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cached_tx.ops.projections import Rows


class Mapped(NamedTuple):
  """Features phi(x) = values exp(scale), float32 or wider.

  Attributes:
    values: the features of a vector up to a factor. All of phi's gradient is here.
    scale: that factor's logarithm; a constant for the gradient.
  """

  values: Float[Array, "... R"]
  scale: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class FeatureMap:
  """A map x (... K), w (M K) -> phi(x) (... R). Hashable: a static argument.

  Attributes:
    rule: the map, of x, of w or None, and of the options; x and w have one dtype.
    projected: w must be given; else it may be, and None means the features of x itself.
    each: features made of one row, or, without w, of one coordinate.
    options: of the rule.
  """

  rule: Callable[..., Mapped]
  projected: bool
  each: int = 1
  options: tuple[Any, ...] = ()

  def __call__(self, x: Float[Array, "... K"], w: Rows | None = None) -> Mapped:
    """The features of each vector.

    Args:
      x: any float dtype; computed in float32, or in float64 if x is. For the kernel
        exp(q . k / sqrt(K)) both q and k are scaled by K ** -0.25 before.
      w: the same rows for queries and keys; cast to that dtype.

    Raises:
      ValueError: the map needs w, and there is none.
    """
    self._check(w is not None)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    w = None if w is None else w.astype(x.dtype)
    return self.rule(x, w, *self.options)

  def count(self, rows: int | None, width: int) -> int:
    """R of M = `rows` (None: no w) and K = `width`.

    Raises:
      ValueError: the map needs w, and there is none.
    """
    self._check(rows is not None)
    return self.each * (width if rows is None else rows)

  def _check(self, given: bool) -> None:
    if self.projected and not given:
      raise ValueError(
        f"the features {self.rule.__name__.strip('_')!r} of the softmax kernel need "
        "the rows of a projection, and there are none: give some, as of `project`"
      )


def positive() -> FeatureMap:
  """exp(w_r . x - |x|^2 / 2) / sqrt(M): SM+ of Lemma 1. All features are positive."""
  return FeatureMap(_positive, projected=True)


def hyperbolic() -> FeatureMap:
  """exp(+-w_r . x - |x|^2 / 2) / sqrt(2M): SMhyp+ of Lemma 1.

  R = 2M features of M rows, with at most half the variance of `positive` (Lemma 2).
  """
  return FeatureMap(_hyperbolic, projected=True, each=2)


def trigonometric() -> FeatureMap:
  """exp(|x|^2 / 2) (cos w_r . x, sin w_r . x) / sqrt(M): SMtrig, R = 2M.

  Products of features may be negative: sums over keys can come near 0 and change sign.
  """
  return FeatureMap(_trigonometric, projected=True, each=2)


def generalised(function: Callable[[Array], Array], epsilon: float = 0.0) -> FeatureMap:
  """f(w_r . x) + epsilon, over sqrt(M); without w, f(x_i) + epsilon.

  Args:
    function: f, of each number; one object for equal maps. Not negative, or the sum
      over the keys may be 0.
    epsilon: added after f, not negative.
  """
  return FeatureMap(_generalised, projected=False, options=(function, epsilon))


def elu1(x: Array) -> Array:
  """elu(x) + 1 of Katharopoulos et al., 2020, arXiv:2006.16236, eq. 7.

  exp(x) below 0, never 1 - 1: its relative precision is that of exp.
  """
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _positive(x: Float[Array, "... K"], w: Rows) -> Mapped:
  """The largest exponent w_r . x is the scale's.

  w_r . x - |x|^2 / 2 is never formed: where |x| is large, it has lost the digits in
  which the features differ.
  """
  products, (half, factor) = _products(x, w), _half_square(x)
  top = jax.lax.stop_gradient(products.max(axis=-1))
  values = jnp.exp(products - top[..., None]) / factor
  return Mapped(values, top - half - math.log(w.shape[0]) / 2)


def _hyperbolic(x: Float[Array, "... K"], w: Rows) -> Mapped:
  products, (half, factor) = _products(x, w), _half_square(x)
  top = jax.lax.stop_gradient(jnp.abs(products).max(axis=-1))
  both = jnp.concatenate([products, -products], axis=-1)  # ... 2M
  values = jnp.exp(both - top[..., None]) / factor
  return Mapped(values, top - half - math.log(2 * w.shape[0]) / 2)


def _trigonometric(x: Float[Array, "... K"], w: Rows) -> Mapped:
  products, (half, factor) = _products(x, w), _half_square(x)
  both = jnp.concatenate([jnp.cos(products), jnp.sin(products)], axis=-1)  # ... 2M
  return Mapped(both * factor, half - math.log(w.shape[0]) / 2)


def _generalised(
  x: Float[Array, "... K"],
  w: Rows | None,
  function: Callable[[Array], Array],
  epsilon: float,
) -> Mapped:
  values = function(x if w is None else _products(x, w)) + epsilon
  top = jax.lax.stop_gradient(jnp.abs(values).max(axis=-1))
  top = jnp.where(top > 0, top, 1)
  rows = 1 if w is None else w.shape[0]
  return Mapped(values / top[..., None], jnp.log(top) - math.log(rows) / 2)


def _products(x: Float[Array, "... K"], w: Rows) -> Float[Array, "... M"]:
  """w_r . x, whose error will be exponentiated: in full precision."""
  return jnp.einsum("...k,mk->...m", x, w, precision=jax.lax.Precision.HIGHEST)


def _half_square(
  x: Float[Array, "... K"],
) -> tuple[Float[Array, "..."], Float[Array, "... 1"]]:
  """|x|^2 / 2 as a constant, and a factor 1 that has the gradient of exp(|x|^2 / 2)."""
  half = jnp.sum(x * x, axis=-1) / 2
  return jax.lax.stop_gradient(half), _one(half)[..., None]


@jax.custom_jvp
def _one(exponent: Array) -> Array:
  """exp(x - c) where c, a constant, equals x.

  Not computed as such: compiled, x and c may be rounded apart, and where both are 1e12
  their difference is then far from 0.
  """
  return jnp.ones_like(exponent)


@_one.defjvp
def _one_jvp(at: tuple[Array], slope: tuple[Array]) -> tuple[Array, Array]:
  one = _one(*at)
  return one, one * slope[0]


FEATURES: dict[str, FeatureMap] = {
  "positive": positive(),
  "hyperbolic": hyperbolic(),
  "trigonometric": trigonometric(),
  "relu": generalised(jax.nn.relu, 1e-3),  # epsilon as in the paper
  "elu1": generalised(elu1),
  "squares": generalised(jnp.square),
}
