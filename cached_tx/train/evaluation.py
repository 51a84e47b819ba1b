"""How well a model predicts a whole stream, and what its memory is worth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cached_tx.data import EvaluationBatches, OrderedBatches, Tokens
from cached_tx.models import DecoderLM
from cached_tx.train import processes, sharding
from cached_tx.train.feed import Feed
from cached_tx.types import Segment, State

MEMORY = ("kept", "zeroed", "shuffled", "stale")
STALE = 4  # segments


class Evaluation(NamedTuple):
  """A stream's score.

  Attributes:
    nats: summed loss over all targets.
    targets: how many there were, BOS and padding not counted.
  """

  nats: float
  targets: int

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.nats / max(self.targets, 1)


class Reading:
  """A split, cut into lanes for a model, and an empty memory to read them with.

  Attributes:
    rows: all lanes.
    mesh: where they are read.
    batches: one segment long, of the rows of this host.
    count: how many of them are read.
    feed: takes a batch to the devices.
    empty: makes a memory without anything in it.
    kept: where the devices have such a memory.
  """

  def __init__(
    self,
    model: DecoderLM,
    tokens: Tokens,
    *,
    rows: int,
    mesh: Mesh,
    segments: int = 0,
    ordered: bool = False,
  ):
    """Cuts the split into `rows` lanes.

    Args:
      model: without parameters.
      tokens: all documents of the split.
      rows: lanes; each but the first begins inside a document with an empty memory.
      mesh: where the model runs.
      segments: at most so many segments of every lane; 0: all.
      ordered: documents do not begin anew; the lanes are those of `OrderedBatches`.

    Raises:
      ValueError: segments are negative, or the rows do not fit the mesh or the text.
    """
    if segments < 0:
      raise ValueError(f"segments={segments}: 0 (all) or more")
    self.rows, self.mesh = rows, mesh
    self.feed = Feed(mesh, rows, model.segment)
    kind: Any = OrderedBatches if ordered else EvaluationBatches
    self.batches = kind(
      tokens,
      rows=rows,
      length=model.segment,
      shard=self.feed.shard,
      shards=self.feed.shards,
    )
    self.count = min(segments or len(self.batches), len(self.batches))
    empty = lambda: model.initial_state(rows)
    self.kept = sharding.memory_shardings(jax.eval_shape(empty), mesh)
    self.empty: Callable[[], State] = jax.jit(empty, out_shardings=self.kept)


class Evaluator:
  """Scores one model on one reading; compiled once for all parameters."""

  def __init__(self, model: DecoderLM, reading: Reading):
    """Takes a model without parameters, and what `Reading` made for it."""
    self._model, self._reading = model, reading
    self._compiled = False
    whole = sharding.replicated(reading.mesh)
    self._step = jax.jit(self._segment, out_shardings=((whole, whole), reading.kept))

  def __call__(self, params: Any, memory: str = "kept") -> Evaluation:
    """Predicts every target once, and never with a later token's help.

    Args:
      params: of the model.
      memory: what each segment reads: the memory that the row's past left (kept);
        an empty one (zeroed); that of the row before it (shuffled); its own of
        STALE segments ago (stale). The memory goes on being updated as if nothing
        had happened.

    Raises:
      ValueError: an unknown choice, or fewer than 2 rows to shuffle.
    """
    if memory not in MEMORY:
      raise ValueError(f"memory={memory!r} is unknown: one of {', '.join(MEMORY)}")
    if memory == "shuffled" and self._reading.rows < 2:
      raise ValueError("memory='shuffled' needs 2 rows or more: change eval.batch")
    reading = self._reading
    empty = state = reading.empty()
    past = [empty] * STALE if memory == "stale" else []  # before the last segments
    sums = []
    for index in range(reading.count):
      batch = reading.feed(reading.batches[index])
      if not self._compiled:
        processes.compile_together(self._step, params, state, batch)
        self._compiled = True
      read = {
        "kept": lambda: state,  # noqa: B023 - called at once
        "zeroed": lambda: empty,
        "shuffled": lambda: _rolled(state),  # noqa: B023
        "stale": lambda: past[0],  # noqa: B023
      }[memory]()
      result, after = self._step(params, read, batch)
      if memory in ("shuffled", "stale"):
        _, after = self._step(params, state, batch)
      past = [*past[1:], state] if past else past  # device memory, for this alone
      state = after
      sums.append(result)
    nats, targets = zip(*jax.device_get(sums), strict=True)
    return Evaluation(float(sum(map(float, nats))), int(sum(map(float, targets))))

  def _segment(self, params: Any, state: State, batch: Any) -> Any:
    out: Any = self._model.apply(
      {"params": params}, batch.tokens, state, Segment(batch.starts)
    )
    logits, state, _ = out
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return (jnp.sum(loss * batch.weights), batch.weights.sum()), state


_rolled: Callable[[State], State] = jax.jit(
  lambda state: jax.tree.map(lambda a: jnp.roll(a, 1, axis=1), state)
)
