"""What can be done with states because they are values: fork, rewind, move rows.

A state is a pytree of arrays. Those of a layer (`layer.initial_state`) lead with B,
those of a model (`model.initial_state`), a plain tuple with one state per layer of its
period, with [periods, B]. So the axis of the rows is known from the type of the whole;
`axis` says it for other trees. All of this holds for `Stream`s too: rows may stand at
different places of their segments.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cached_tx.ops.fingerprint import named_leaves
from cached_tx.types import State


def fork(state: State) -> State:
  """A copy that shares no buffer: either may be donated, the other stays valid.

  Without donation no copy is needed: nothing writes to a state.
  """
  return jax.tree.map(jnp.copy, state)


def row_axis(state: State) -> int:
  """The axis of the rows: 1 in a model's state, 0 in a layer's.

  Raises:
    ValueError: a tree that is neither.
  """
  if not isinstance(state, tuple):
    raise ValueError(
      f"a {type(state).__name__} is neither a model's state (a tuple of layers' states)"
      " nor a layer's (a NamedTuple): say with axis= which axis its rows have"
    )
  return 0 if hasattr(state, "_fields") else 1


def row_count(state: State, axis: int | None = None) -> int:
  """B, on which all arrays must agree; 0 if there are none.

  Raises:
    ValueError: an array without that axis, or of another size there.
  """
  axis = row_axis(state) if axis is None else axis
  first, count = "", None
  for name, leaf in named_leaves(state).items():
    if leaf.ndim <= axis:
      raise ValueError(
        f"{name} has shape {leaf.shape}, so no rows on axis {axis}: axis is 1 for a "
        "model's state, 0 for a layer's"
      )
    if count is None:
      first, count = name, leaf.shape[axis]
    if leaf.shape[axis] != count:
      raise ValueError(
        f"{first} has {count} rows on axis {axis}, but {name} has {leaf.shape[axis]}"
      )
  return count or 0


def pick_rows(
  state: State, rows: Sequence[int] | np.ndarray, axis: int | None = None
) -> State:
  """The state of some rows, in the order given; a row may come more than once.

  Args:
    state: of B rows.
    rows: their numbers, 0 to B - 1; one or more.
    axis: of the rows; None: from the type of the state.

  Raises:
    ValueError: a row that is not there, or a tree whose rows are not clear.
  """
  axis = row_axis(state) if axis is None else axis
  count = row_count(state, axis)
  index = np.asarray(rows)
  if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
    raise ValueError(f"rows is {rows!r}; it must be one or more numbers of rows")
  if index.min() < 0 or (count and index.max() >= count):
    wrong = index.min() if index.min() < 0 else index.max()
    raise ValueError(f"there is no row {wrong}: the state has rows 0 to {count - 1}")
  return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis), state)


def stack_rows(states: Sequence[State], axis: int | None = None) -> State:
  """One state with the rows of several, in order.

  A cache that all rows share (GRC's shared scope) belongs to no row: carry it beside.

  Args:
    states: one or more, of the same model or layer; each of any number of rows. All
      boundary states or all streams.
    axis: of the rows; None: from the type of the first state.

  Raises:
    ValueError: no state, or states that differ in more than their number of rows.
  """
  if not states:
    raise ValueError("states is empty; there must be one or more to stack")
  axis = row_axis(states[0]) if axis is None else axis
  wanted: Any = jax.tree.structure(states[0])
  kinds = [_without(axis, state) for state in states]
  for number, state in enumerate(states):
    if jax.tree.structure(state) != wanted:
      raise ValueError(
        f"state {number} has the structure {jax.tree.structure(state)}, state 0 has "
        f"{wanted}: open a stream from boundary states, to stack them with streams"
      )
    row_count(state, axis)
    for name, kind in kinds[number].items():
      if kind != kinds[0][name]:
        raise ValueError(
          f"{name} of state {number} and of state 0 have dtypes and shapes, but for "
          f"the rows, {kind} and {kinds[0][name]}"
        )
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *states)


def _without(axis: int, state: State) -> dict[str, tuple]:
  """Dtypes and shapes, the axis of the rows left out."""
  return {
    name: (str(leaf.dtype), leaf.shape[:axis], leaf.shape[axis + 1 :])
    for name, leaf in named_leaves(state).items()
  }


class Snapshots:
  """Earlier states of a stream, to go back to.

      snapshots = Snapshots(keep=8)
      for piece in pieces:
        snapshots.take(read, state)
        logits, state = own(piece, state)
        read += piece.shape[1]
      read, state = snapshots.rewind(to=1000)  # then read on from token `read`

  A snapshot is a copy: it takes as many bytes as the state itself, however long the
  text (`cached-tx inspect` shows how many), and stays valid when the state is donated.
  """

  def __init__(self, keep: int | None = None):
    """Holds the newest `keep` snapshots; None: all.

    Raises:
      ValueError: fewer than 1.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"keep is {keep}; it counts snapshots: 1 or more, or None")
    self._keep = keep
    self._states: dict[int, State] = {}

  @property
  def positions(self) -> list[int]:
    """Where one can go back to, oldest first."""
    return list(self._states)

  def take(self, position: int, state: State) -> None:
    """Keeps a copy of the state at a position, such as the number of tokens read.

    Raises:
      ValueError: the position does not lie after the newest snapshot.
    """
    if self._states and position <= self.positions[-1]:
      raise ValueError(
        f"position is {position}, but the newest snapshot is of {self.positions[-1]}: "
        "positions grow; `rewind` goes back"
      )
    self._states[position] = fork(state)
    if self._keep is not None and len(self._states) > self._keep:
      del self._states[self.positions[0]]

  def rewind(self, to: int) -> tuple[int, Any]:
    """Goes back, and forgets the snapshots after `to`.

    Returns:
      The newest position not after `to`, and a copy of its state.

    Raises:
      ValueError: there is no snapshot so old.
    """
    known = [position for position in self._states if position <= to]
    if not known:
      raise ValueError(f"no snapshot at {to} or before it; there are {self.positions}")
    self._states = {position: self._states[position] for position in known}
    return known[-1], fork(self._states[known[-1]])
