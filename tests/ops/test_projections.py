import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.ops.projections import PROJECTIONS, project

BLOCKED = ("orthogonal", "regularised", "hadamard")
EQUAL = ("regularised", "hadamard")  # whose rows have one length


@functools.cache
def draws(kind, count, features, width):
  """`count` projections, of as many keys."""
  draw = lambda key: project(kind, key, features, width)
  keys = jax.random.split(jax.random.key(0), count)
  return np.float64(jax.jit(jax.vmap(draw))(keys))


# Of a coordinate of a row; K is 4.
FOURTH = {
  "iid": 3,
  "orthogonal": 3,
  "regularised": 3 * 4 / 6,
  "hadamard": 3 - 2 * 10 / 16,
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_moments_of_a_coordinate(kind):
  """Within five standard errors; the last row is the second of a block cut short."""
  w = draws(kind, 4000, 6, 4)
  for row in (0, 3, 5):
    for power, want in ((1, 0), (2, 1), (3, 0), (4, FOURTH[kind])):
      seen = w[:, row] ** power
      error = seen.std(axis=0) / 4000**0.5
      assert (np.abs(seen.mean(axis=0) - want) <= 5 * error + 1e-6).all(), (row, power)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_rows_of_a_block_are_orthogonal_those_of_others_are_not(kind):
  w = draws(kind, 100, 13, 8)
  gram = np.einsum("nrk,nsk->nrs", w, w)
  norms = np.sqrt(np.einsum("nrr->nr", gram))
  cosine = np.abs(gram / norms[:, :, None] / norms[:, None])
  cosine = cosine[:, ~np.eye(13, dtype=bool)].reshape(100, 13, 12)
  own = np.arange(13) // 8
  block = (own[:, None] == own)[~np.eye(13, dtype=bool)].reshape(13, 12)
  assert cosine[:, ~block].max() > 0.7
  if kind in BLOCKED:  # worst measured: 5e-7
    assert cosine[:, block].max() < 2e-6
  else:
    assert cosine[:, block].max() > 0.7


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_lengths(kind):
  square = (draws(kind, 4000, 6, 4) ** 2).sum(axis=2)
  if kind in EQUAL:
    np.testing.assert_allclose(square, 4, rtol=2e-6)
  else:  # chi-square of 4 degrees, and independent from row to row
    assert np.abs(square.mean(axis=0) - 4).max() < 5 * (8 / 4000) ** 0.5
    assert np.abs(square.var(axis=0) / 8 - 1).max() < 5 * (8 / 4000) ** 0.5
    off = np.corrcoef(square.T)[~np.eye(6, dtype=bool)]
    assert np.abs(off).max() < 5 / 4000**0.5


def test_lengths_do_not_depend_on_directions():
  w = draws("orthogonal", 4000, 6, 4)
  length = np.linalg.norm(w, axis=2)
  first = np.abs(w[..., 0]) / length
  for row in range(6):
    assert abs(np.corrcoef(first[:, row], length[:, row])[0, 1]) < 5 / 4000**0.5


def diagonals(square):
  """Means of the diagonal, and how far from 0 they may be: five standard errors."""
  seen = np.einsum("njj->nj", square)
  return seen.mean(axis=0), 5 * seen.std(axis=0) / len(seen) ** 0.5


@pytest.mark.parametrize("kind", ["orthogonal", "regularised"])
def test_directions_have_no_bias(kind):
  w = draws(kind, 2000, 16, 16)
  mean, allowed = diagonals(w / np.linalg.norm(w, axis=2, keepdims=True))
  assert (np.abs(mean) < allowed).all()


def test_the_bias_of_a_plain_qr_would_be_seen():
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(2000, 16, 16)))
  mean, allowed = diagonals(q)
  assert (mean[:-1] < -0.12).all() and (mean[:-1] > -0.22).all()
  assert (np.abs(mean) > allowed).all()


def test_regularised_rows_have_the_directions_of_orthogonal_ones():
  a, b = (draws(kind, 100, 13, 8) for kind in ("orthogonal", "regularised"))
  unit = lambda w: w / np.linalg.norm(w, axis=2, keepdims=True)
  np.testing.assert_allclose(unit(a), unit(b), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_hadamard_is_exact(width):
  w = draws("hadamard", 2, 2 * width, width)[:, :width]  # of the first block
  assert (w * width == np.round(w * width)).all()
  gram = np.einsum("nrk,nsk->nrs", w, w)
  np.testing.assert_array_equal(
    gram, np.broadcast_to(width * np.eye(width), gram.shape)
  )


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_key_is_all_that_decides(kind):
  key = jax.random.key(7)
  w = project(kind, key, 5, 4)
  assert w.shape == (5, 4) and w.dtype == jnp.float32
  np.testing.assert_array_equal(w, project(kind, jax.random.key(7), 5, 4))
  # Another program may round otherwise.
  drawn = jax.jit(project, static_argnums=(0, 2, 3))(kind, key, 5, 4)
  np.testing.assert_allclose(drawn, w, rtol=0, atol=2e-6)
  with jax.enable_x64(True):
    wide = project(kind, key, 5, 4)
  np.testing.assert_allclose(wide, w, rtol=0, atol=2e-6)
  others = [jax.random.fold_in(key, layer) for layer in range(3)]
  others = [w, *(project(kind, other, 5, 4) for other in [*others, jax.random.key(8)])]
  for i, a in enumerate(others):
    for b in others[:i]:
      assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize(
  "kind,features,width,message",
  [
    ("gaussian", 4, 4, "'gaussian'; one of iid, orthogonal, regularised, hadamard"),
    ("iid", 0, 4, "features is 0"),
    ("orthogonal", -1, 4, "features is -1"),
    ("hadamard", 4, 12, "width is 12, .*powers of two.*orthogonal or regularised"),
  ],
)
def test_what_cannot_be_drawn_is_refused(kind, features, width, message):
  with pytest.raises(ValueError, match=message):
    project(kind, jax.random.key(0), features, width)
