"""Text from a model, token by token, in memory that does not grow."""

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cached_tx.data.tokenizers import WINDOW, decoded
from cached_tx.layers import is_stream
from cached_tx.load import Loaded
from cached_tx.memory import fork
from cached_tx.models import DecoderLM
from cached_tx.types import Segment, State

CHUNK = 16  # tokens that one call of the device samples; changes speed, not results
COLDEST = 1e-30  # temperature; logits divided by less could overflow float32


class Reached(NamedTuple):
  """Where a text stands: all that `generate` needs to go on as if it had not ended.

  Attributes:
    state: after all tokens of the text but the last.
    last: the last token of every row, which is not read yet.
    drawn: how many tokens were sampled; the draws go on from there.
  """

  state: State
  last: Int[np.ndarray, "B"]
  drawn: int


class Generation(Iterator[Any]):
  """Ids as they are sampled.

  Attributes:
    reached: after the last id, where the text stands; None before.
  """

  def __init__(self, ids: Iterator[Any]):
    """Takes the ids from a generator that returns what was reached."""
    self._ids = ids
    self.reached: Reached | None = None

  def __next__(self) -> Any:
    """The next id: an int, or an array with one for every row."""
    try:
      return next(self._ids)
    except StopIteration as end:
      self.reached = end.value if self.reached is None else self.reached
      raise


class _Carry(NamedTuple):
  """Where a generation stands between two chunks. Donated to the next."""

  state: State
  sampled: Int[Array, "B"]  # what the last logits gave
  number: Int[Array, ""]  # how many were sampled; below 0 within the prompt


class _Sampling(NamedTuple):
  """The numbers of `generate`, on the device: changing them compiles nothing."""

  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]
  seed: Int[Array, ""]


def generate(
  model: DecoderLM,
  params: Any,
  prompt_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
  *,
  bos: int,
  length: int | None = None,
  temperature: float | int = 1.0,
  top_k: int = 0,
  top_p: float | int = 1.0,
  seed: int = 0,
  batch: int = 1,
  state: State | None = None,
  after: Reached | None = None,
) -> Generation:
  """Continues a prompt.

  The prompt's whole segments are read in parallel, the rest and what is sampled one
  token after the other, which gives what the parallel pass would give. Token n is a
  function of the logits, the seed, n and the row alone. BOS is never sampled: training
  gives it no weight as a target, so a model does not learn where documents end.

  Args:
    model: the network.
    params: its parameters.
    prompt_ids: one row (S) that all rows share, or one per row (B S), S >= 1; a
      document begins with BOS.
    bos: the id that begins a document; where the prompt has it the memory starts anew.
    length: how many tokens to sample; None: without end.
    temperature: divides the logits; 0 takes the most likely token, and so does
      anything below 1e-30, which float32 could not divide by.
    top_k: samples from the k most likely tokens; 0: from all.
    top_p: then from the fewest that together have this probability.
    seed: of the draws; an int32.
    batch: B, rows.
    state: of the tokens before the prompt, from `initial_state`, `open_stream` or a
      call of the model; None: nothing came before. It stays valid.
    after: of a former generation, in place of `state`: goes on as that one would have,
      from a prompt that may be empty. It stays valid.

  Returns:
    An iterator over ids: an int where B is 1, otherwise an int32 array of B. When it
    has ended, its `reached` tells where the text stands.

  Raises:
    ValueError: a number out of its range, or a prompt that does not fit.
  """
  prompt = _checked(model, prompt_ids, batch, length, temperature, top_k, top_p, after)
  if not -(2**31) <= seed < 2**31:
    raise ValueError(f"seed is {seed}; it must fit in 32 bits: -2**31 to 2**31 - 1")
  if after is not None and state is not None:
    raise ValueError("state and after cannot both be given: after has a state")
  state, drawn = (state, 0) if after is None else (after.state, after.drawn)
  if state is None:
    state = model.initial_state(batch)
  state, rest = _read_segments(model, params, prompt, bos, state)
  carry = _Carry(
    fork(model_stream(model, state, batch)),
    jnp.zeros((batch,), jnp.int32),
    jnp.asarray(drawn + 1 - rest.shape[1], jnp.int32),
  )
  sampling = _Sampling(
    jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(seed)
  )
  greedy, cut = temperature < COLDEST, bool(top_k) or top_p < 1
  step = partial(_chunk, model, greedy, cut, bos, params, sampling)
  return Generation(_tokens(step, carry, rest, length, drawn))


def _checked(
  model: DecoderLM,
  ids: Any,
  batch: int,
  length: Any,
  temperature: Any,
  k: int,
  p: Any,
  after: Reached | None,
) -> np.ndarray:
  """The prompt, B S, int32; first what was not read yet."""
  if batch < 1:
    raise ValueError(f"batch is {batch}; it must be 1 row or more")
  if length is not None and length < 0:
    raise ValueError(f"length is {length}; it counts tokens: 0 or more")
  if not 0 <= temperature <= 1 / COLDEST:
    raise ValueError(
      f"temperature is {temperature}; it must be 0 (greedy) or more, {1 / COLDEST:g} at"
      " most"
    )
  if k < 0:
    raise ValueError(f"top_k is {k}; it must be 0 (all tokens) or more")
  if not 0 < p <= 1:
    raise ValueError(f"top_p is {p}; it must be above 0 and at most 1")
  prompt = np.asarray(ids)
  if prompt.ndim == 1:
    prompt = np.broadcast_to(prompt, (batch, len(prompt)))
  if after is not None:
    if after.last.shape != (batch,):
      raise ValueError(f"batch is {batch}, but after has {len(after.last)} rows")
    if prompt.ndim == 2 and len(prompt) == batch:
      prompt = np.concatenate([after.last[:, None], prompt], axis=1)
  if prompt.ndim != 2 or len(prompt) != batch or not prompt.size:
    raise ValueError(
      f"the prompt has shape {np.shape(ids)}; it must be (S,) or ({batch}, S), and S "
      "at least 1: begin a document with BOS"
    )
  if prompt.min() < 0 or prompt.max() >= model.vocab:
    raise ValueError(
      f"the prompt has ids from {prompt.min()} to {prompt.max()}; the model has 0 to "
      f"{model.vocab - 1}"
    )
  return prompt.astype(np.int32)


def model_stream(model: DecoderLM, state: State, batch: int) -> State:
  """The state as one that takes any number of tokens."""
  return state if is_stream(state) else model.open_stream(state, batch)


def _read_segments(
  model: DecoderLM, params: Any, prompt: np.ndarray, bos: int, state: State
) -> tuple[State, np.ndarray]:
  """Reads whole segments, each at once; at least one token of the prompt is left."""
  C = model.segment
  whole = 0 if is_stream(state) else (prompt.shape[1] - 1) // C * C
  for begin in range(0, whole, C):
    ids = prompt[:, begin : begin + C]
    state = _read(model, params, ids, ids == bos, state)
  return state, prompt[:, whole:]


@partial(jax.jit, static_argnums=0)
def _read(model: DecoderLM, params: Any, ids: Any, starts: Any, state: State) -> State:
  return model.apply({"params": params}, ids, state, Segment(starts))[1]


def _tokens(
  step: Any, carry: _Carry, rest: np.ndarray, length: int | None, drawn: int
) -> Generator[Any, None, Reached]:
  """Yields samples, while the device computes the next chunk.

  All tokens are read but the last one, which no sample needs.
  """
  batch, left = rest.shape
  skip = left - 1  # outputs that are the prompt's own
  total = None if length is None else skip + length
  done = at = 0
  last = rest[:, -1]
  pending: Any = None
  while total is None or done < total:
    ahead = None
    if total is None or at < total:
      forced = np.full((CHUNK, batch), -1, np.int32)
      piece = rest[:, at : at + CHUNK].T
      forced[: len(piece)] = piece
      count = CHUNK if total is None else min(CHUNK, total - at)
      carry, outs = step(carry, forced, np.int32(count))
      ahead = (outs, count)
      at += count
    outs, count = ((), 0) if pending is None else pending
    for sampled in np.asarray(outs)[:count]:
      if done >= skip:
        last = sampled
        yield int(sampled[0]) if batch == 1 else sampled
      done += 1
    pending = ahead
  return Reached(carry.state, last, drawn + done - skip)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def _chunk(
  model: DecoderLM,
  greedy: bool,
  cut: bool,
  bos: int,
  params: Any,
  sampling: _Sampling,
  carry: _Carry,
  forced: Int[Array, "n B"],
  count: Int[Array, ""],
) -> tuple[_Carry, Int[Array, "n B"]]:
  """Reads `count` tokens: the forced ones, and where those are -1, what was sampled.

  Returns:
    The carry, and what the logits after each token gave; -1 from `count` on.
  """

  def one(i: Array, both: tuple[_Carry, Array]) -> tuple[_Carry, Array]:
    carry, outs = both
    token = jnp.where(forced[i] >= 0, forced[i], carry.sampled)[:, None]
    out: Any = model.apply(
      {"params": params}, token, carry.state, Segment(token == bos)
    )
    logits, state, _ = out
    logits = logits[:, 0].at[:, bos].set(-jnp.inf)
    sampled = _sample(logits, carry.number, sampling, greedy, cut)
    return _Carry(state, sampled, carry.number + 1), outs.at[i].set(sampled)

  return jax.lax.fori_loop(0, count, one, (carry, jnp.full_like(forced, -1)))


def _sample(
  logits: Float[Array, "B V"],
  number: Int[Array, ""],
  sampling: _Sampling,
  greedy: bool,
  cut: bool,
) -> Int[Array, "B"]:
  """Token `number` of every row."""
  if greedy:
    return jnp.argmax(logits, axis=1).astype(jnp.int32)
  logits = logits / sampling.temperature
  ids = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape)
  if cut:
    ids = jnp.argsort(-logits, axis=1)
    logits = jnp.take_along_axis(logits, ids, axis=1)
    kept = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[1])
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < kept, logits, -jnp.inf)
    shares = jax.nn.softmax(logits, axis=1)
    before = jnp.cumsum(shares, axis=1) - shares
    logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
  key = jax.random.fold_in(jax.random.key(sampling.seed), number)
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
  place = jax.vmap(jax.random.categorical)(keys, logits)
  return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0].astype(jnp.int32)


def write(
  own: Loaded,
  prompt: bytes,
  out: Any,
  *,
  tokens: int,
  load_state: str | os.PathLike | None = None,
  save_state: str | os.PathLike | None = None,
  **options: Any,
) -> int:
  """Writes a continuation of a text, each token as soon as there is one.

  A long document is read once, with `tokens=0` and `save_state`, and asked many times,
  each time with `load_state` and a question as the prompt.

  Args:
    own: the model.
    prompt: the document so far; may be empty. With `load_state`, what follows it.
    out: a binary file; gets the raw bytes, flushed.
    tokens: how many; 0 only reads.
    load_state: a file that `save_state` made: goes on from there.
    save_state: a file to write, where the text ends.
    options: as of `generate`.

  Returns:
    How many tokens were sampled.

  Raises:
    FileNotFoundError: no file to load, or no folder to save in.
    ValueError: an option out of its range; a file that is damaged or of another model.
  """
  if save_state is not None and not Path(save_state).absolute().parent.is_dir():
    raise FileNotFoundError(f"no folder for the state's file {os.fspath(save_state)}")
  if load_state is None:
    after, before = None, list[int]()
    ids = own.ids(prompt)[0]
  else:
    after, before = _resumed(own, load_state)
    ids = own.tokenizer.encode(prompt)
  text = [*before, *ids.tolist()]
  sampled: list[int] = []

  def remembered(ids: Iterable[int]) -> Iterator[int]:
    for i in ids:
      sampled.append(i)
      yield i

  bos = own.tokenizer.bos
  found = generate(
    own.model, own.params, ids, bos=bos, length=tokens, after=after, **options
  )
  for piece in decoded(own.tokenizer, remembered(found), text):
    out.write(piece)
    out.flush()
  if save_state is not None and found.reached is not None:
    recent = [*text, *sampled][-WINDOW:]
    meta = {"recent": recent, "drawn": found.reached.drawn}
    own.save_state(save_state, found.reached.state, meta)
  return len(sampled)


def _resumed(own: Loaded, path: str | os.PathLike) -> tuple[Reached, list[int]]:
  """Where a saved text stands, and its latest ids."""
  state, meta = own.load_state(path)
  if not {"recent", "drawn"} <= meta.keys():
    raise ValueError(
      f"{os.fspath(path)} holds a state alone, not where a text stands: save it with "
      "`cached-tx generate --save_state`"
    )
  recent = meta["recent"]
  return Reached(state, np.array(recent[-1:], np.int32), meta["drawn"]), recent
