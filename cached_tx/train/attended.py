"""What layers tell of their attention, bucket by bucket, and its mean over a text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cached_tx.layers import ANALYSIS
from cached_tx.memory import MemoryModule, kind_of
from cached_tx.models import DecoderLM
from cached_tx.ops.buckets import buckets, slices
from cached_tx.types import Segment, State

PARTS = 6  # buckets of a region


class Group(NamedTuple):
  """Layers of one memory, whose keys are cut alike.

  Attributes:
    kind: of the memory.
    regions: names and sizes of the parts of their keys, oldest first.
    places: which layers of a period they are.
    layers: their numbers, in the order of their values: by period, then by place.
  """

  kind: str
  regions: tuple[tuple[str, int], ...]
  places: tuple[int, ...]
  layers: tuple[int, ...]

  @property
  def keys(self) -> list[int]:
    """How many keys each bucket has."""
    return slices([size for _, size in self.regions], PARTS)


class Tally:
  """Mean and standard error of samples that come in pieces, in float64."""

  def __init__(self):
    """Nothing yet."""
    self.count: Any = 0
    self._sum: Any = 0.0
    self._squares: Any = 0.0

  def add(self, values: np.ndarray, counted: np.ndarray) -> None:
    """Adds the samples of the last axis of `values`, those that are `counted`."""
    values = np.where(counted, np.float64(values), 0)
    self.count = self.count + np.broadcast_to(counted, values.shape).sum(axis=-1)
    self._sum = self._sum + values.sum(axis=-1)
    self._squares = self._squares + np.square(values).sum(axis=-1)

  def mean(self) -> np.ndarray:
    """NaN where nothing was counted."""
    return self._sum / np.where(self.count > 0, self.count, np.nan)

  def error(self) -> np.ndarray:
    """1 sigma of the mean of independent samples; NaN for fewer than 2."""
    count = np.where(self.count > 1, self.count, np.nan)
    variance = np.maximum(self._squares / count - self.mean() ** 2, 0)
    return np.sqrt(variance / (count - 1))


def groups(model: DecoderLM) -> tuple[Group, ...]:
  """The layers that give weights to keys; regions without a key are left out.

  Raises:
    ValueError: there is no such layer.
  """
  found: dict[tuple[MemoryModule, Any], list[int]] = {}
  for place, attention in enumerate(model.attentions()):
    regions = tuple(region for region in attention.regions() if region[1])
    if regions:
      found.setdefault((model.memories[place], regions), []).append(place)
  if not found:
    kinds = sorted({kind_of(memory) for memory in model.memories})
    raise ValueError(
      f"memory.kind is {' and '.join(kinds)}: running sums, in which no key has a "
      "weight of its own; analyse needs a layer of another kind"
    )
  period = len(model.memories)
  return tuple(
    Group(
      kind_of(memory),
      regions,
      tuple(places),
      tuple(g * period + i for g in range(model.periods) for i in places),
    )
    for (memory, regions), places in found.items()
  )


def observe(
  model: DecoderLM, params: Any, tokens: jax.Array, starts: jax.Array, state: State
) -> tuple[list[dict[str, Any]], State]:
  """One segment of B rows, from a state at a boundary.

  Returns:
    For each of `groups(model)`, N being its layers: mass and visible (N slices B), the
    weight in each bucket and the share of its keys that a query could see; full (N B),
    see `Attended`; losses (N B), by name, of the segments that rows finished; beside a
    cache, share and reached (N B), see `Blended`. And the state afterwards.
  """
  out: Any = model.apply(
    {"params": params}, tokens, state, Segment(starts), mutable=[ANALYSIS]
  )
  (_, after, _), told = out
  stack = told[ANALYSIS]["stack"]
  found = []
  for group in groups(model):
    layers = [stack[f"blocks_{place}"]["attention"] for place in group.places]
    found.append(_of_group(group, layers))
  return found, after


def _of_group(group: Group, layers: list[Any]) -> dict[str, Any]:
  """What the layers told; leaves lead with the one segment, then with G."""

  def joined(*leaves: jax.Array) -> jax.Array:
    both = jnp.stack([leaf[0] for leaf in leaves], axis=1)  # G places ...
    return both.reshape(-1, *both.shape[2:])

  both = lambda name, own: jax.tree.map(joined, *[layer[name][0] for layer in own])
  inner = [layer.get("own", layer) for layer in layers]  # beside a cache
  attended = both("attended", inner)
  sizes = tuple(size for _, size in group.regions)
  cut = lambda told: buckets(told, sizes, PARTS).swapaxes(1, 2)  # N slices B
  keys = jnp.maximum(jnp.asarray(group.keys), 1)[None, :, None]
  found = {
    "mass": cut(attended.received),
    "visible": cut(attended.visible) / keys,
    "full": attended.full,
    "losses": both("losses", inner) if "losses" in inner[0] else {},
  }
  if "blended" in layers[0]:
    found["share"], found["reached"] = both("blended", layers)
  return found
