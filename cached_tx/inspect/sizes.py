"""What parameters, states and a training step need, from shapes alone."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from cached_tx.data import Batch
from cached_tx.inspect.flops import arguments, run
from cached_tx.models import DecoderLM
from cached_tx.train import sharding
from cached_tx.train.experiment import Experiment
from cached_tx.train.state import (
  TrainState,
  configured_optimizer,
  init_params,
  plan,
)
from cached_tx.train.step import compiled_step


class Parameter(NamedTuple):
  """One array of the model.

  Attributes:
    path: names joined by "/".
    shape: leading with G where it belongs to a layer.
    dtype: name.
    spec: how each dimension is divided over the mesh.
    numbers: how many.
    device_numbers: how many one device holds.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  spec: str
  numbers: int
  device_numbers: int


def parameter_table(model: DecoderLM, mesh: Any = None) -> list[Parameter]:
  """Every parameter of a model.

  Args:
    model: without parameters.
    mesh: a Mesh or AbstractMesh; None: one device.
  """
  mesh = mesh or abstract_mesh()
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  places = jax.tree.leaves(sharding.parameter_shardings(boxed, mesh))
  leaves = jax.tree_util.tree_leaves_with_path(sharding.unboxed(boxed))
  return [
    Parameter(
      "/".join(str(getattr(key, "key", key)) for key in path),
      leaf.shape,
      leaf.dtype.name,
      ", ".join(str(axis or "-") for axis in place.spec),
      leaf.size,
      math.prod(place.shard_shape(leaf.shape)),
    )
    for (path, leaf), place in zip(leaves, places, strict=True)
  ]


def abstract_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1
) -> AbstractMesh:
  """A mesh without devices. -1 is the rest of those present, 1 where none fit."""
  sizes = [data, fsdp, tensor, sequence]
  known = math.prod(s for s in sizes if s != -1)
  rest = jax.device_count() // known if jax.device_count() % known == 0 else 1
  sizes = [rest if s == -1 else s for s in sizes]
  kinds = (AxisType.Auto,) * len(sizes)
  return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=kinds)


def state_bytes(model: DecoderLM, rows: int = 1, stream: bool = False) -> int:
  """Bytes of the memories of `rows` rows, over all layers.

  Args:
    model: without parameters.
    rows: B.
    stream: of the state that takes any number of tokens, which also holds the
      unfinished segment.
  """
  return sum(state_bytes_by_layer(model, rows, stream))


def state_bytes_by_layer(model: DecoderLM, rows: int, stream: bool) -> list[int]:
  """For each layer of the period: of all its G copies together."""

  def make():
    state = model.initial_state(rows)
    return model.open_stream(state, rows) if stream else state

  return [_bytes(own) for own in jax.eval_shape(make)]


def _bytes(tree: Any) -> int:
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def attended_slots(model: DecoderLM) -> list[int | None]:
  """For each layer of the period: memory slots, besides the segment's own tokens.

  None where running sums hold the whole document instead.
  """
  return [attention.slots() for attention in model.attentions()]


def activation_bytes(model: DecoderLM, segments: int) -> int:
  """Bytes per row that the forward pass of a step keeps for the backward pass.

  Before XLA fuses or drops any of it: a bound more than a measurement.
  """

  def kept(rows):
    def forward(params, *rest):
      return jax.vjp(lambda p: run(model, p, *rest), params)[1]

    return _bytes(jax.eval_shape(forward, *arguments(model, rows, segments)))

  return kept(2) - kept(1)  # without what does not grow with the rows, as parameters


def train_state(experiment: Experiment, mesh: Any) -> tuple[TrainState, TrainState]:
  """Shapes of the whole train state, and their shardings; see `plan`."""
  config, model = experiment.config, experiment.model
  optimizer, _ = configured_optimizer(config, model)
  own: Any = dict(seed=config.seed, batch=config.batch, ema=config.optimizer.ema)
  _, state, places = plan(model, optimizer, **own, mesh=mesh)
  return state, places


def device_bytes(tree: Any, places: Any) -> int:
  """What one device holds of a tree."""

  def own(array: Any, place: NamedSharding) -> int:
    return math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(own, tree, places)))


def compiled_memory(experiment: Experiment) -> dict[str, int]:
  """What XLA says one device needs for the compiled training step, in bytes.

  Raises:
    ValueError: the config's mesh does not fit the devices there are.
  """
  config, model, mesh = experiment.config, experiment.model, experiment.mesh
  state, places = train_state(experiment, mesh)
  optimizer, groups = configured_optimizer(config, model)
  step = compiled_step(
    places,
    sharding.replicated(mesh),
    model=model,
    optimizer=optimizer,
    labels=groups,
    ema=config.optimizer.ema,
  )
  struct = jax.ShapeDtypeStruct
  state = jax.tree.map(lambda a, s: struct(a.shape, a.dtype, sharding=s), state, places)
  shape, rows = (config.batch, config.segment * config.segments), sharding.rows(mesh)
  dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.bool_)
  parts: list[Any] = [struct(shape, dtype, sharding=rows) for dtype in dtypes]
  batch = Batch(*parts)
  with sharding.on(mesh):
    found = step.lower(state, batch).compile().memory_analysis()
  return {
    "arguments": found.argument_size_in_bytes,
    "temporary": found.temp_size_in_bytes,
    "outputs besides arguments": found.output_size_in_bytes - found.alias_size_in_bytes,
  }
