"""Checks that can be pointed at a layer of one's own, from a test."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from cached_tx.memory import cleared, row_axis
from cached_tx.ops.fingerprint import named_leaves
from cached_tx.types import Losses, Segment, State

Apply = Callable[[Any, Array, State, Segment], tuple[Array, State, Losses]]
_Rows = Bool[np.ndarray, "B"]
_Tokens = Bool[np.ndarray, "B L"]
_OF_PARAMETERS = "parameter gradients"
_CUTS = 16  # at most so many places after which later tokens are poisoned


class _Place(NamedTuple):
  """Where poison is put, which must not reach the one under test.

  Attributes:
    name: in words.
    tokens: of the input.
    state: of the state, a tree of masks like it; None: nowhere.
    for_all: whether nobody may see it, so that it may be NaN.
  """

  name: str
  tokens: _Tokens
  state: State | None
  for_all: bool


class _Case(NamedTuple):
  """One who must not notice.

  Attributes:
    who: in words.
    tokens: whose outputs, loss and input gradients.
    rows: whose state afterwards.
    losses: whose auxiliary losses.
    places: that are masked for it.
  """

  who: str
  tokens: _Tokens
  rows: _Rows
  losses: _Rows
  places: tuple[_Place, ...]


def _floats(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def empty_places(state: State) -> State:
  """Where a state of this package's layers holds nothing: True, in a tree like it."""
  mark = lambda a: jnp.where(a == 0, jnp.ones_like(a), a) if _floats(a) else a
  marked = jax.tree.map(mark, state)
  return jax.tree.map(lambda a, b: (a != 0) & (b == 0), marked, cleared(marked))


def poison_check(
  apply_fn: Apply,
  params: Any,
  x: Shaped[Array, "B L *D"],
  state: State,
  segment: Segment,
  *,
  empty: Callable[[State], State] = empty_places,
  axis: int | None = None,
  causal: bool = True,
  largest: float = 1e6,
  seed: int = 0,
  compiler_options: dict[str, Any] | None = None,
) -> None:
  """Asserts that what is masked for a document has no influence on it, to the last bit.

  NaN is put where nobody may look: at padding, in the inputs and states of other
  rows, and at places of the state that hold nothing. Finite numbers are put where a
  document may not look though another one does: at the other documents of its row, in
  the memory of the one before it, and at later tokens. None of it may change the
  outputs, the loss (outputs times random weights, and auxiliary losses), the state
  afterwards or the gradient of the inputs of the document, and finite numbers none of
  the parameters' gradients. Nor may the loss have a gradient there. -0 equals 0.

      layer = attention_for(XLMemory(5), width=16, heads=2, segment=4)
      x = jax.random.normal(jax.random.key(0), (2, 6, 16))
      starts = jnp.zeros((2, 6), bool).at[:, 3].set(True)
      valid = jnp.ones((2, 6), bool).at[0, 4].set(False)
      segment = Segment(starts, valid)
      state = layer.open_stream(layer.initial_state(2), 2)
      params = layer.init(jax.random.key(1), x, state, segment)["params"]

      def apply_fn(params, x, state, segment):
        return layer.apply({"params": params}, x, state, segment)

      poison_check(apply_fn, params, x, state, segment)

  Use a state that remembers something, several documents in a row, and two or more
  rows: what is not there is not checked. One compilation serves all runs; shapes and
  devices stay as they are in the arguments, so sharded arrays check a mesh.

  Args:
    apply_fn: (params, x, state, segment) to (y, state, losses), as a layer of this
      package: y leads with B L, losses are a dictionary of B numbers each.
    params: of the layer, floats.
    x: the inputs. A model that takes ids is checked from its embeddings on.
    state: before the call; a NamedTuple, or another pytree with `axis`.
    segment: documents and padding of the inputs.
    empty: says where a state holds nothing, by a tree of bools like it. Only its
      floats are poisoned.
    axis: of the state's rows; None: 0 for a NamedTuple, 1 for a plain tuple (a model).
    causal: whether later tokens of its own document are masked for a token.
    largest: of the finite numbers.
    seed: of poison and weights.
    compiler_options: as of `jax.jit`.

  Raises:
    AssertionError: something leaks. Says what of whom changed, by which poison where.
    ValueError: the inputs are no floats, or the axis of the rows is not clear.
  """
  if not _floats(x):
    raise ValueError(f"x is of {x.dtype}; poison needs floats: begin after embedding")
  if axis is None and jax.tree.leaves(state):
    axis = row_axis(state)
  probe = _Probe(
    apply_fn, params, x, state, segment, empty, axis or 0, compiler_options
  )
  poison = _Poison(largest, np.random.default_rng(seed))
  for case in _cases(probe, causal):
    _check(probe, poison, case)


class _Poison(NamedTuple):
  """Finite numbers of every size up to the largest, of both signs."""

  largest: float
  rng: np.random.Generator

  def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = self.largest ** self.rng.random(shape)
    size = np.where(self.rng.random(shape) < 0.25, self.largest, size)
    return (size * self.rng.choice([-1.0, 1.0], shape)).astype(dtype)


class _Probe:
  """Runs the layer, forward and backward, on poisoned copies of its arguments."""

  def __init__(self, apply_fn, params, x, state, segment, empty, axis, options):
    self.x, self.state, self.empty, self.axis = x, state, empty, axis
    self._params, self._segment = params, segment
    self.starts = np.asarray(segment.starts)
    self.real = np.ones_like(self.starts)
    if segment.valid is not None:
      self.real = np.asarray(segment.valid)
    out = jax.eval_shape(apply_fn, params, x, state, segment)[0]
    self._weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)

    def total(params, x, state, segment, weights, rows):
      y, after, losses = apply_fn(params, x, state, segment)
      y_wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
      own = jnp.where(weights != 0, y_wide * weights.astype(y_wide.dtype), 0).sum()
      for loss in losses.values():
        own = own + jnp.where(rows, loss, 0).sum()
      return own, (y, after, losses)

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    self._run = jax.jit(both, compiler_options=options)

  def run(
    self, case: _Case, places: tuple[_Place, ...], poison: Any
  ) -> dict[str, np.ndarray]:
    """What the case sees; "" is the gradient of its loss at all inputs."""
    x, state = self.x, self.state
    for place in places:
      x = _poisoned(x, place.tokens, poison)
      if place.state is not None:
        put = lambda leaf, mask: _poisoned(leaf, np.asarray(mask), poison)
        state = jax.tree.map(put, state, place.state)
    weights = np.where(_wide(case.tokens, self._weights), self._weights, np.float32(0))
    args = (self._params, x, state, self._segment, weights, case.losses)
    (total, (y, after, losses)), (slopes, slope) = jax.device_get(self._run(*args))
    rows = np.flatnonzero(case.rows)
    kept = jax.tree.map(
      lambda a, gone: np.where(_wide(gone, a), np.zeros_like(a), a),
      after,
      self.empty(after),
    )
    found = {
      "outputs": y[case.tokens],
      "loss": total,
      "input gradients": slope[case.tokens],
    }
    for name, loss in losses.items():
      found[f"auxiliary loss {name!r}"] = loss[case.losses]
    for name, leaf in named_leaves(kept).items():
      found[f"state afterwards ({name})"] = np.take(leaf, rows, axis=self.axis)
    for name, leaf in named_leaves(slopes).items():
      found[f"{_OF_PARAMETERS} ({name})"] = leaf
    return found | {"": slope}


def _wide(mask: Any, leaf: Any) -> np.ndarray:
  """The mask with axes of 1 behind it, to fit the leaf."""
  mask = np.asarray(mask)
  return mask.reshape(mask.shape + (1,) * (np.ndim(leaf) - mask.ndim))


def _poisoned(value: Any, mask: np.ndarray, poison: Any) -> Any:
  """`value` with poison, NaN if None, where the mask is; it lies where it lay."""
  if not _floats(value) or not mask.any():
    return value
  old = np.asarray(value)
  new = np.full(old.shape, np.nan, old.dtype)
  if poison is not None:
    new = poison(old.shape, old.dtype)
  new = np.where(_wide(mask, old), new, old)
  return jax.device_put(new, value.sharding) if isinstance(value, jax.Array) else new


def _cases(probe: _Probe, causal: bool) -> Iterator[_Case]:
  """All who are checked: rows, their documents, and beginnings of rows."""
  real = probe.real
  rows, length = real.shape
  nobody = np.zeros((rows,), bool)
  for row in range(rows):
    own = np.arange(rows) == row
    mine = own[:, None] & real
    yield _Case(f"row {row}", mine, own, own, _for_nobody(probe, own))
    documents = np.cumsum(probe.starts & real, axis=1)[row]
    numbers = np.unique(documents[real[row]])
    for number in numbers:
      inside = mine & (documents == number)[None]
      memory = _at_rows(probe, own) if number else None
      place = _Place("other documents of its row", mine & ~inside, memory, False)
      last = own & (number == numbers[-1])
      # A row's losses are sums over its documents: of one alone if it has no other.
      losses = own if len(numbers) == 1 else nobody
      who = f"document {number} of row {row}"
      yield _Case(who, inside, last, losses, (place,))
  if not causal:
    return
  for cut in np.unique(np.linspace(0, length - 2, _CUTS).astype(int)):
    later = np.arange(length)[None] > cut
    place = _Place(f"tokens after token {cut}", real & later, None, False)
    who = f"the tokens up to {cut}"
    yield _Case(who, real & ~later, nobody, nobody, (place,))


def _for_nobody(probe: _Probe, own: _Rows) -> tuple[_Place, ...]:
  """What only others than the row could see, or nobody."""
  nowhere = np.zeros_like(probe.real)
  others = ~own[:, None] & probe.real
  return (
    _Place("padding", ~probe.real, None, True),
    _Place("the inputs of other rows", others, None, True),
    _Place("the states of other rows", nowhere, _at_rows(probe, ~own), True),
    _Place("empty places of the state", nowhere, probe.empty(probe.state), True),
  )


def _at_rows(probe: _Probe, rows: _Rows) -> State:
  """A tree of masks like the state: all of these rows."""

  def mask(leaf):
    shape = [1] * leaf.ndim
    shape[probe.axis] = len(rows)
    return np.broadcast_to(rows.reshape(shape), leaf.shape)

  return jax.tree.map(mask, probe.state)


def _check(probe: _Probe, poison: _Poison, case: _Case) -> None:
  clean = probe.run(case, (), None)
  slope = clean.pop("")
  for name, numbers in clean.items():
    if not np.isfinite(numbers).all():
      raise AssertionError(f"{name} of {case.who}: not finite even without poison")
  for place in case.places:
    if slope[place.tokens].any():
      raise AssertionError(f"the loss of {case.who} has a gradient at {place.name}")
  for kind, own in (("NaN", None), (f"numbers up to {poison.largest:g}", poison)):
    places = tuple(p for p in case.places if p.for_all or own is not None)
    if not places or not _changed(clean, probe.run(case, places, own), own is None):
      continue
    for tried in [*((place,) for place in places), places]:
      changed = _changed(clean, probe.run(case, tried, own), own is None)
      if changed:
        where = " or ".join(place.name for place in tried)
        raise AssertionError(f"{changed} of {case.who} changed by {kind} at {where}")


def _changed(
  clean: dict[str, np.ndarray], poisoned: dict[str, np.ndarray], by_nan: bool
) -> str:
  """What differs, in words; empty if nothing does. NaN may reach parameters."""
  for name, want in clean.items():
    if by_nan and name.startswith(_OF_PARAMETERS):
      continue
    different = np.asarray(poisoned[name] != want)
    if different.any():
      return f"{name} ({different.sum()} of {different.size} numbers)"
  return ""
