"""States are values: forked, gone back to, and moved between batches."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.memory import Snapshots, fork, pick_rows, row_count, stack_rows
from cached_tx.types import Segment
from tests.kinds import SOME, B, T, parallel, streamed, text, toy


def start(kind, rows=B):
  own = toy(kind)
  return own.model.open_stream(own.model.initial_state(rows), rows)


@SOME
@pytest.mark.parametrize("pieces", [None, ([3, 3], [3])], ids=["boundary", "stream"])
def test_rows_that_were_moved_go_on_as_before(kind, pieces):
  """Of boundary states, and of streams at different places of their segments."""
  own, length = toy(kind), T if pieces is None else 3
  states = []
  for number in range(2):
    tokens, starts = text(number)
    if pieces is None:
      _, state, _ = parallel(own, tokens, starts)
    else:
      _, state, _ = streamed(own, tokens, starts, pieces[number])
    states.append(state)
  more, begun = text(2, length=length)
  begun[:] = False
  segment = Segment(begun)
  rows = [[1], [0]]  # of the first state and of the second one
  mixed = stack_rows([pick_rows(s, r) for s, r in zip(states, rows, strict=True)])
  assert row_count(mixed) == (2 if jax.tree.leaves(mixed) else 0)  # of none: nothing
  got, after, _ = own.apply(own.params, more, mixed, segment)
  for number, [row] in enumerate(rows):
    fed = more if row == number else more[::-1]
    want, alone, _ = own.apply(own.params, fed, states[number], segment)
    np.testing.assert_allclose(got[number], want[row], rtol=0, atol=1e-6)
    chex.assert_trees_all_close(
      pick_rows(after, [number]), pick_rows(alone, [row]), rtol=0, atol=1e-6
    )


def test_rows_come_in_the_order_given():
  own, (tokens, starts) = toy("xl"), text(0)
  _, state, _ = parallel(own, tokens, starts)
  for rows in ([1], [1, 0], [1, 1, 0]):
    want = jax.tree.map(lambda a, rows=rows: np.asarray(a)[:, rows], state)
    chex.assert_trees_all_equal(pick_rows(state, rows), want)


def test_a_layers_state_has_its_rows_in_front():
  layer = toy("xl").model.attentions()[0]
  state = layer.open_stream(layer.initial_state(3), 3)
  state = state._replace(phase=jnp.arange(3, dtype=jnp.int32))
  assert pick_rows(state, [2, 0]).phase.tolist() == [2, 0]
  assert stack_rows([state, pick_rows(state, [1])]).phase.tolist() == [0, 1, 2, 1]
  named = {"phase": state.phase}
  assert pick_rows(named, [1], axis=0)["phase"].tolist() == [1]


class Odd(NamedTuple):
  a: jax.Array
  b: jax.Array


@pytest.mark.parametrize(
  "work,said",
  [
    (lambda s: pick_rows(s, [B]), f"no row {B}: the state has rows 0 to {B - 1}"),
    (lambda s: pick_rows(s, [0, -1]), "no row -1"),
    (lambda s: pick_rows(s, []), "one or more numbers"),
    (lambda s: pick_rows(s, np.eye(2, dtype=int)), "one or more numbers"),
    (lambda s: pick_rows({"a": s}, [0]), "say with axis="),
    (
      lambda s: pick_rows(s, [0], axis=2),
      "0/memory/recent/tokens has 5 .* 0/tokens has 4",
    ),
    (lambda s: pick_rows((s[0].phase[0],), [0]), "no rows on axis 1"),
    (lambda s: pick_rows(Odd(jnp.ones(2), jnp.ones(3)), [0]), "a has 2 .* b has 3"),
    (lambda s: stack_rows([]), "states is empty"),
    (lambda s: stack_rows([s, (s[0].memory,)]), "state 1 has the structure"),
    (lambda s: stack_rows([s, start("grc")]), "state 1 has the structure"),
    (
      lambda s: stack_rows([s, jax.tree.map(lambda a: a[:1], s)]),
      "0/memory/recent/tokens of state 1 and of state 0",
    ),
  ],
)
def test_what_cannot_be_moved_is_refused(work, said):
  with pytest.raises(ValueError, match=said):
    work(start("xl"))


def test_a_fork_outlives_its_origin():
  state = start("compressive-conv")
  want = jax.device_get(state)
  copy = fork(state)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(copy), strict=True):
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    a.delete()  # as donation does
  chex.assert_trees_all_equal(jax.device_get(copy), want)


def test_snapshots_go_back_and_forget_the_rest():
  snapshots = Snapshots(keep=3)
  state = start("xl")
  for position in (0, 4, 8, 12):
    own = jax.tree.map(lambda a, p=position: jnp.full_like(a, p), state)
    snapshots.take(position, own)
    jax.tree.map(lambda a: a.delete(), own)  # as donation does
  assert snapshots.positions == [4, 8, 12]
  for _ in range(2):  # and what comes back may be donated too
    position, found = snapshots.rewind(to=11)
    assert position == 8 and snapshots.positions == [4, 8]
    assert np.asarray(found[0].phase).tolist() == [[8, 8], [8, 8]]
    jax.tree.map(lambda a: a.delete(), found)
  with pytest.raises(ValueError, match=r"no snapshot at 3 .* \[4, 8\]"):
    snapshots.rewind(to=3)
  with pytest.raises(ValueError, match="position is 8, but the newest"):
    snapshots.take(8, state)
  with pytest.raises(ValueError, match="keep is 0"):
    Snapshots(keep=0)
