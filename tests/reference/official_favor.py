"""The published conventions of FAVOR+ where they differ from its equations, in float64.

Written from a description of the authors' JAX code (arXiv:2009.14794), one line per
rule; nothing here is an algorithm to use. q, k and v are [B, L, H, d], features
[B, H, L, m].
"""

import numpy as np

EPSILON = 1e-6  # added to features, and the threshold of the denominator


def heads_first(x):
  """[B, L, H, d] -> [B, H, L, d], in float64."""
  return np.moveaxis(np.float64(x), 2, 1)


def positive(x, w, is_query, epsilon=EPSILON, normalise=True):
  """m^-1/2 (exp(w . x - |x|^2 / 2 - largest w . x) + epsilon).

  The largest product is that of a query, but of all keys of a batch row and head.
  """
  x, w = heads_first(x), np.float64(w)
  if normalise:
    x = x * x.shape[-1] ** -0.25
  products = np.einsum("bhld,md->bhlm", x, w)
  axes = (3,) if is_query else (2, 3)
  exponents = products - (x * x).sum(axis=3, keepdims=True) / 2
  exponents = exponents - products.max(axis=axes, keepdims=True)
  return w.shape[0] ** -0.5 * (np.exp(exponents) + epsilon)


def trigonometric(x, w):
  """m^-1/2 (cos, sin) of w . x, times exp(|x|^2 / 2 - its maximum over positions)."""
  x, w = heads_first(x), np.float64(w)
  x = x * x.shape[-1] ** -0.25
  products = np.einsum("bhld,md->bhlm", x, w)
  half = (x * x).sum(axis=3, keepdims=True) / 2
  both = np.concatenate([np.cos(products), np.sin(products)], axis=3)
  return w.shape[0] ** -0.5 * both * np.exp(half - half.max(axis=2, keepdims=True))


def generalised(x, w, function, epsilon, normalise=False):
  """f(w . x) + epsilon, without 1 / sqrt(m); f(x) + epsilon where w is None."""
  x = heads_first(x)
  if normalise:
    x = x * x.shape[-1] ** -0.25
  products = x if w is None else np.einsum("bhld,md->bhlm", x, np.float64(w))
  return function(products) + epsilon


def relu(x):
  """max(x, 0)."""
  return np.maximum(x, 0)


def elu1(x):
  """elu(x) + 1."""
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


FUNCTIONS = {"relu": (relu, 1e-3), "elu1": (elu1, 0.0)}  # and what is added


def features(kind, q, k, w, epsilon=EPSILON):
  """Features of queries and keys: pos, sincos, relu or elu1, the last two unscaled."""
  if kind == "pos":
    return positive(q, w, True, epsilon), positive(k, w, False, epsilon)
  if kind == "sincos":
    return trigonometric(q, w), trigonometric(k, w)
  function, own = FUNCTIONS[kind]
  return generalised(q, w, function, own), generalised(k, w, function, own)


def attention(queries, keys, v, causal=False, renormalise=True, threshold=EPSILON):
  """Outputs [B, L, H, dv] of features.

  A denominator R with |R| <= threshold becomes R + 2 threshold. The official code has
  one number for this threshold and for the epsilon of positive features.
  """
  v = heads_first(v)
  weights = np.einsum("bhqm,bhsm->bhqs", queries, keys)
  if causal:
    weights = np.tril(weights)
  out = np.einsum("bhqs,bhsd->bhqd", weights, v)
  if renormalise:
    total = weights.sum(axis=3, keepdims=True)
    total = total + 2 * threshold * (np.abs(total) <= threshold)
    out = out / total
  return np.moveaxis(out, 1, 2)
