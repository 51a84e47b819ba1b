"""Conventions of other Performers where they differ from the equations, in float64.

Written from descriptions of performer-pytorch and of T2T-ViT's Token_performer, one
line per rule; nothing here is an algorithm to use. q, k and v of the first are
[B, H, L, d], its features [B, H, L, m].
"""

import math

import numpy as np

EPSILON = 1e-4  # performer-pytorch's, added to features of the softmax kernel
CAUSAL_EPSILON = 1e-6  # its causal form's, added to the sums of features of keys
T2T_EPSILON = 1e-8  # added to denominators


def features(x, w, is_query, epsilon=EPSILON):
  """m^-1/2 (exp(w . x - |x|^2 / 2 - largest w . x) + epsilon), x times d^-1/4.

  The largest product is that of a query, but of all keys of a batch row and head,
  those of padding too.
  """
  x, w = np.float64(x) * x.shape[-1] ** -0.25, np.float64(w)
  products = np.einsum("bhld,md->bhlm", x, w)
  top = products.max(axis=3 if is_query else (2, 3), keepdims=True)
  exponents = products - (x * x).sum(axis=3, keepdims=True) / 2 - top
  return w.shape[0] ** -0.5 * (np.exp(exponents) + epsilon)


def generalised(x, w):
  """relu(w . x) + 0.001, or of x itself, x times d^-1/4."""
  x = np.float64(x) * x.shape[-1] ** -0.25
  x = x if w is None else np.einsum("bhld,md->bhlm", x, np.float64(w))
  return np.maximum(x, 0) + 1e-3


def linear(queries, keys, v, shown=None, in_denominator=True):
  """Attention of features; keys that are not shown may stay in the denominator."""
  weights = np.einsum("bhqm,bhsm->bhqs", queries, keys)
  some = weights if shown is None else weights * shown[:, None, None]
  below = weights if in_denominator else some
  return np.einsum("bhqs,bhsd->bhqd", some / below.sum(axis=3, keepdims=True), v)


def causal(queries, keys, v, epsilon=CAUSAL_EPSILON):
  """The same of a triangle; `epsilon` is added to every sum of features of keys."""
  weights = np.tril(np.einsum("bhqm,bhsm->bhqs", queries, keys))
  below = weights.sum(axis=3) + epsilon * queries.sum(axis=3)
  return np.einsum("bhqs,bhsd->bhqd", weights, v) / below[..., None]


def t2t_features(x, w):
  """m^-1/2 exp(w . x - |x|^2 / 2), of x as it is, without a maximum: [B, L, m]."""
  half = (x * x).sum(axis=-1, keepdims=True) / 2
  return w.shape[0] ** -0.5 * np.exp(np.einsum("bld,md->blm", x, w) - half)


def t2t_norm(weights, name, x):
  """Layer normalisation with an epsilon of 1e-5."""
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
  return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def t2t_linear(weights, name, x):
  """X W^T + b."""
  return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def t2t_parts(weights, x):
  """Keys, queries and values of a block's input, in the order of their matrix."""
  return np.split(t2t_linear(weights, "kqv", t2t_norm(weights, "norm1", x)), 3, axis=-1)


def t2t_attention(weights, x, epsilon=T2T_EPSILON):
  """The block's attention by random features, before the projection."""
  k, q, v = t2t_parts(weights, x)
  queries, keys = (t2t_features(y, weights["w"]) for y in (q, k))
  pairs = np.einsum("bqm,bsm->bqs", queries, keys)
  return pairs @ v / (pairs.sum(axis=2, keepdims=True) + epsilon)


def t2t_rest(weights, x, attended):
  """What follows attention: the way around it is that of the values, not of x."""
  y = t2t_parts(weights, x)[2] + t2t_linear(weights, "proj", attended)
  inner = t2t_linear(weights, "mlp.0", t2t_norm(weights, "norm2", y))
  gelu = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
  return y + t2t_linear(weights, "mlp.2", gelu)
