"""The clock of memories that change every C tokens, whatever the calls bring.

A module with a clock offers three methods:

  read(queries, index, tokens, starts, memory, deterministic) -> arrays, B Q
    first: what the queries, standing at `index` among the C tokens of their segment,
    find in the memory and in the tokens up to their own. None: all C, in order. Where
    `run` is given more to share, it follows;
  fold(tokens, starts, memory) -> (memory, losses)
    the memory after the whole segment;
  empty(batch) -> memory
    the memory of nothing, which a document begins with.

A boundary state is the memory itself; it takes whole segments without padding, all at
once. A `Stream` also carries the unfinished segment; it takes any number of tokens, of
any rows at any phase, one after the other, and gives the same results.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.memory import cleared
from cached_tx.types import DType, Hidden, Index, Losses, Segment, State


class Stream(NamedTuple):
  """A memory and the segment that is being filled. Leaves lead with B."""

  memory: State
  tokens: Float[Array, "B C D"]  # the layer's inputs since the clock last struck
  starts: Bool[Array, "B C"]
  phase: Index  # how many of them there are, below C; int32

  def cleared(self) -> "Stream":
    """The stream with 0 at the places that hold nothing, whatever stands there."""
    C = self.starts.shape[-1]
    places = jnp.arange(C, dtype=jnp.int32).reshape((1,) * self.phase.ndim + (C,))
    taken = places < self.phase[..., None]
    tokens = jnp.where(taken[..., None], self.tokens, 0)
    return Stream(cleared(self.memory), tokens, self.starts & taken, self.phase)


def is_stream(state: State) -> bool:
  """Whether any layer's memory stands within a segment, as far as types tell."""
  stream = lambda part: isinstance(part, Stream)
  return any(map(stream, jax.tree.leaves(state, is_leaf=stream)))


@runtime_checkable
class Clocked(Protocol):
  """A module that `run` can drive."""

  segment: int
  dtype: DType

  def read(
    self,
    queries: Any,
    index: Any,
    tokens: Any,
    starts: Any,
    memory: State,
    deterministic: bool,
  ) -> Any:
    """What the queries find."""

  def fold(self, tokens: Any, starts: Any, memory: State) -> tuple[State, Losses]:
    """The memory after the segment."""

  def empty(self, batch: int) -> State:
    """The memory of nothing."""


def open_stream(
  memory: State, batch: int, segment: int, width: int, dtype: DType
) -> Stream:
  """A stream at the boundary of a segment."""
  return Stream(
    memory,
    jnp.zeros((batch, segment, width), dtype),
    jnp.zeros((batch, segment), bool),
    jnp.zeros((batch,), jnp.int32),
  )


def run(
  module: Clocked,
  x: Hidden,
  state: State,
  segment: Segment,
  deterministic: bool,
  shared: tuple = (),
) -> tuple[Any, State, Losses]:
  """Reads and folds the tokens of a call. `shared` goes to every `read`, as it is.

  Returns:
    What `read` gives for every token, the state afterwards, of the type it had, and
    the losses of the segments that were finished.

  Raises:
    ValueError: if a boundary state gets anything but one whole segment of real tokens.
  """
  state = cleared(state)
  x = x.astype(module.dtype)  # what a stream keeps of it
  if isinstance(state, Stream):
    return _run_stream(module, x, state, segment, deterministic, shared)
  if segment.valid is not None or x.shape[1] != module.segment:
    padded = " with a mask of padding" if segment.valid is not None else ""
    raise ValueError(
      f"{x.shape[1]} tokens{padded} meet a state at a segment's boundary, which takes "
      f"exactly {module.segment} tokens without padding: pass "
      "`open_stream(state)` instead of `state`, or change segment"
    )
  out = module.read(x, None, x, segment.starts, state, deterministic, *shared)
  memory, losses = module.fold(x, segment.starts, state)
  return out, memory, losses


def _where(rows: Bool[Array, "B"], new: Any, old: Any) -> Any:
  """`new` where `rows`, else `old`, over all leaves, which lead with B."""

  def pick(a, b):
    return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(pick, new, old)


def _begun(module: Any, stream: Stream, start: Bool[Array, "B"]) -> Stream:
  """The stream where a document begins: nothing of an older one stays in it."""
  tokens = jnp.where(start[:, None, None], 0, stream.tokens)
  memory = _where(start, module.empty(len(start)), stream.memory)
  return stream._replace(memory=memory, tokens=tokens)


def _run_stream(
  module: Any,
  x: Hidden,
  state: Stream,
  segment: Segment,
  deterministic: bool,
  shared: tuple,
) -> tuple[Any, Stream, Losses]:
  """One token after the other."""
  C = module.segment
  starts = segment.starts
  valid = segment.real
  x = jnp.where(valid[..., None], x, 0)
  if module.is_initializing():  # what `fold` makes cannot be made inside a cond
    module.fold(state.tokens, state.starts, state.memory)

  def token(module, stream, now):
    x, start, valid = now  # B D, B, B
    stream = _begun(module, stream, start)
    here = (jnp.arange(C)[None] == stream.phase[:, None]) & valid[:, None]
    x = x[:, None].astype(stream.tokens.dtype)  # B 1 D
    tokens = jnp.where(here[..., None], x, stream.tokens)
    begun = stream.starts | (here & start[:, None])
    index = stream.phase[:, None]
    past = stream.memory
    out = module.read(x, index, tokens, begun, past, deterministic, *shared)
    out = _where(valid, out, jax.tree.map(jnp.zeros_like, out))
    phase = stream.phase + valid
    full = phase == C

    def strike(module, memory):
      new, losses = module.fold(tokens, begun, memory)
      kept = _where(full, new, memory)
      return kept, jax.tree.map(lambda a: jnp.where(full, a, 0), losses)

    def wait(module, memory):
      shapes = jax.eval_shape(lambda: strike(module, memory)[1])
      return memory, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    memory, losses = nn.cond(full.any(), strike, wait, module, stream.memory)
    clear = full[:, None]
    stream = Stream(
      memory,
      jnp.where(clear[..., None], 0, tokens),
      begun & ~clear,
      jnp.where(full, 0, phase),
    )
    return stream, (jax.tree.map(lambda a: a[:, 0], out), losses)

  scan = nn.scan(
    token,
    variable_broadcast="params",
    split_rngs={"params": False, "dropout": True},
    in_axes=1,
    out_axes=(1, 0),
  )
  state, (out, losses) = scan(module, state, (x, starts & valid, valid))
  return out, state, jax.tree.map(lambda a: a.sum(axis=0), losses)
