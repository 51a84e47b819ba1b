"""The poison check catches every kind of leak, and names it."""

import re
import runpy
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float

from cached_tx.testing import poison_check
from cached_tx.types import Segment

B, L, M, D = 2, 5, 3, 4


class Kept(NamedTuple):
  """A state of two slots or more."""

  tokens: Float[Array, "B M D"]
  valid: Bool[Array, "B M"]


def empty(state):
  gone = jnp.broadcast_to(~state.valid[..., None], state.tokens.shape)
  return Kept(gone, jnp.zeros_like(state.valid))


def hidden(z):
  """0 in the forward pass, to the last bit, with the gradient of z."""
  return z - jax.lax.stop_gradient(z)


def toy(leak=""):
  """Sums each document's tokens so far and, if it goes on, the slots; or does worse."""

  def apply_fn(params, x, state, segment):
    starts, valid = segment
    valid = jnp.ones_like(starts) if leak == "padding" else valid
    x = jnp.where(valid[..., None], x, 0)
    documents = jnp.cumsum(starts & valid, axis=1)
    if leak == "documents":
      documents = jnp.zeros_like(documents)
    seen = documents[:, :, None] == documents[:, None]  # B L L
    if leak != "future":
      seen = seen & jnp.tril(jnp.ones((L, L), bool))[None]
    w = params["w"]
    y = jnp.einsum("bts,bsd,de->bte", seen.astype(x.dtype), x, w)
    slots = jnp.where(state.valid[..., None], state.tokens, 0)
    if leak == "empty":
      slots = state.tokens * state.valid[..., None]
    goes_on = (documents == 0)[..., None]
    if leak == "memory":
      goes_on = jnp.ones_like(goes_on)
    y = y + jnp.where(goes_on, (slots @ w).sum(axis=1, keepdims=True), 0)
    y = jnp.where(valid[..., None], y, 0)
    total = jnp.where(valid[..., None], x, 0).sum(axis=(1, 2))  # B
    other = total[::-1, None, None]
    if leak == "rows":
      y = y + 1e-3 * other
    if leak == "gradient":
      y = y + hidden(jnp.where(goes_on, 1e-3 * x[:, -1:], 0))
    if leak == "parameters":
      y = y + hidden(jnp.nan_to_num(jax.lax.stop_gradient(other)) * w.sum())
    last = documents == documents[:, -1:]
    kept = jnp.where((last & valid)[..., None], x, 0)
    if leak == "state":
      kept = x
    after = Kept(state.tokens * 0, jnp.zeros_like(state.valid))
    after = Kept(
      jnp.broadcast_to(kept.sum(axis=1, keepdims=True), after.tokens.shape),
      jnp.ones_like(after.valid),
    )
    loss = total[::-1] if leak == "loss" else total
    if leak == "older loss":
      loss = loss + slots.sum(axis=(1, 2))
    return y, after, {"size": loss}

  return apply_fn


def check(apply_fn, *, begun=((0, 2),), **options):
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  state = Kept(make(B, M, D), jnp.asarray([[True, True, False], [False, True, True]]))
  starts = jnp.zeros((B, L), bool).at[tuple(zip(*begun, strict=True))].set(True)
  valid = jnp.ones((B, L), bool).at[1, 1].set(False)
  args = ({"w": make(D, D)}, make(B, L, D), state, Segment(starts, valid))
  poison_check(apply_fn, *args, empty=empty, **options)


def test_a_right_layer_passes():
  check(toy())


@pytest.mark.parametrize(
  "leak,said",
  [
    ("padding", "the loss of row 1 has a gradient at padding"),
    ("rows", "the loss of row 0 has a gradient at the inputs of other rows"),
    ("empty", "outputs .* of row 0 changed by NaN at empty places of the state"),
    ("documents", "document 1 of row 0 has a gradient at other documents of its row"),
    ("memory", "document 1 of row 0 changed by numbers up to 1e.06 at other documents"),
    ("future", "the tokens up to 0 has a gradient at tokens after token 0"),
    ("gradient", "document 0 of row 0 has a gradient at other documents of its row"),
    (
      "parameters",
      r"parameter gradients \(w\) .* of row 0 .* the inputs of other rows",
    ),
    ("state", r"state afterwards \(tokens\) .* of document 1 of row 0 changed"),
    ("loss", "the loss of row 0 has a gradient at the inputs of other rows"),
  ],
)
def test_every_leak_is_caught_and_named(leak, said):
  with pytest.raises(AssertionError, match=said):
    check(toy(leak))


def test_the_auxiliary_loss_of_a_row_with_one_new_document_is_its_own():
  begun = ((0, 2), (1, 0))
  check(toy(), begun=begun)
  with pytest.raises(AssertionError, match=r"loss .*of document 1 of row 1 changed"):
    check(toy("older loss"), begun=begun)


def with_stopped_gradients(leak):
  """The leak, without a gradient that would give it away first."""

  def apply_fn(params, x, state, segment):
    right = toy()(params, x, state, segment)
    stopped = jax.lax.stop_gradient
    wrong = toy(leak)(stopped(params), stopped(x), stopped(state), segment)
    zero = lambda z: jnp.where(jnp.isfinite(z), hidden(z), 0)
    return jax.tree.map(
      lambda a, b: a if a.dtype == bool else b + zero(a), right, wrong
    )

  return apply_fn


@pytest.mark.parametrize(
  "leak,said",
  [
    ("padding", "outputs .* of row 1 changed by NaN at padding"),
    ("rows", "outputs .* of row 0 changed by NaN at the inputs of other rows"),
    ("documents", "outputs .* changed by numbers up to 1e.06 at other documents"),
    ("future", "outputs .* changed by numbers up to 1e.06 at tokens after token 0"),
    ("loss", r"loss .* of row 0 changed by NaN at the inputs of other rows"),
  ],
)
def test_values_that_leak_without_a_gradient(leak, said):
  with pytest.raises(AssertionError, match=said):
    check(with_stopped_gradients(leak))


def test_a_bidirectional_layer_may_look_ahead():
  check(toy("future"), causal=False)


def test_ids_and_unclear_states_are_refused():
  x, segment = jnp.zeros((B, L, D)), Segment(jnp.zeros((B, L), bool))
  with pytest.raises(ValueError, match="x is of int32"):
    poison_check(toy(), {}, x.astype(jnp.int32), Kept(x, x[..., 0] > 0), segment)
  with pytest.raises(ValueError, match="say with axis="):
    poison_check(toy(), {}, x, {"tokens": x}, segment)


IMPORTS = """
import jax
import jax.numpy as jnp
from cached_tx.layers import attention_for
from cached_tx.memory import XLMemory
from cached_tx.testing import poison_check
from cached_tx.types import Segment
"""


def test_the_example_of_the_docstring_runs(tmp_path):
  [block] = re.findall(r"-0 equals 0\.\n\n((?: {6}.*\n|\n)+)", poison_check.__doc__)
  assert "poison_check(apply_fn, params, x, state, segment)" in block
  file = tmp_path / "example.py"
  file.write_text(IMPORTS + textwrap.dedent(block))
  runpy.run_path(str(file))
