"""Feature maps and their derivatives, one vector and feature at a time, in float64."""

import numpy as np

FUNCTIONS = {  # f, f' and the number added to f
  "relu": (lambda a: max(a, 0.0), lambda a: float(a > 0), 1e-3),
  "elu1": (lambda a: a + 1 if a > 0 else np.exp(a), lambda a: min(1.0, np.exp(a)), 0.0),
  "squares": (lambda a: a * a, lambda a: 2 * a, 0.0),
}


def features(name, x, w=None):
  """phi(x) and its derivative by x (R, K), of x (K,) and w (M, K)."""
  if name in FUNCTIONS:
    return generalised(*FUNCTIONS[name], x, w)
  return {
    "positive": positive,
    "hyperbolic": hyperbolic,
    "trigonometric": trigonometric,
  }[name](x, w)


def positive(x, w):
  """SM+: exp(w . x - |x|^2 / 2) / sqrt(M)."""
  phi = [np.exp(r @ x - x @ x / 2) / np.sqrt(len(w)) for r in w]
  return np.array(phi), np.array([p * (r - x) for p, r in zip(phi, w, strict=True)])


def hyperbolic(x, w):
  """SMhyp+: the positive features of w, then of -w, over sqrt(2)."""
  phi, slope = positive(x, np.concatenate([w, -w]))
  return phi, slope


def trigonometric(x, w):
  """SMtrig: exp(|x|^2 / 2) (cos w . x, then sin w . x) / sqrt(M)."""
  size = np.exp(x @ x / 2) / np.sqrt(len(w))
  phi = [size * np.cos(r @ x) for r in w] + [size * np.sin(r @ x) for r in w]
  slope = [size * (np.cos(r @ x) * x - np.sin(r @ x) * r) for r in w]
  slope += [size * (np.sin(r @ x) * x + np.cos(r @ x) * r) for r in w]
  return np.array(phi), np.array(slope)


def generalised(function, derivative, added, x, w):
  """f(w . x) + added, over sqrt(M); f(x_i) + added where w is None."""
  size = 1.0 if w is None else len(w) ** -0.5
  w = np.eye(len(x)) if w is None else w
  phi = np.array([size * (function(r @ x) + added) for r in w])
  return phi, np.array([size * derivative(r @ x) * r for r in w])
