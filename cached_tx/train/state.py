"""All that a training step reads and writes."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cached_tx.models import DecoderLM
from cached_tx.train import sharding
from cached_tx.train.optimizer import AUXILIARY, MAIN, make_optimizer, matrices
from cached_tx.types import Segment


class TrainState(flax.struct.PyTreeNode):
  """A value: donated to each step, saved whole.

  Attributes:
    step: finished steps, int32. It is also the position of the input.
    params: float32.
    opt_state: of the optimiser.
    memory: the model's state; leaves lead with G, then B.
    rng: folded with the step for every draw.
    ema: moving average of params, or () where there is none.
  """

  step: Any
  params: Any
  opt_state: Any
  memory: Any
  rng: Any
  ema: Any = ()


def init_params(model: DecoderLM, key: jax.Array) -> Any:
  """Parameters, boxed with their logical axis names."""
  tokens = jnp.zeros((1, model.segment), jnp.int32)
  starts = jnp.zeros((1, model.segment), bool)
  variables = model.init(key, tokens, model.initial_state(1), Segment(starts))
  return variables["params"]


def labels(model: DecoderLM, params: Any) -> Any:
  """MAIN or AUXILIARY for each parameter: which gradient reaches it."""
  names = {f"blocks_{i}": set(m.auxiliary) for i, m in enumerate(model.memories)}

  def label(path, _):
    keys = {str(getattr(p, "key", p)) for p in path}
    own: set[str] = set().union(*(names[key] for key in keys & names.keys()))
    return AUXILIARY if keys & own else MAIN

  return jax.tree_util.tree_map_with_path(label, params)


def configured_optimizer(
  config: ConfigDict, model: DecoderLM
) -> tuple[optax.GradientTransformation, Any]:
  """The optimiser that a config's steps and section `optimizer` ask for.

  Returns:
    It, and MAIN or AUXILIARY for each parameter.

  Raises:
    ValueError: naming the key, for a value out of its range.
  """
  options = dict(config.optimizer)
  del options["ema"]  # of the training step
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  groups = labels(model, sharding.unboxed(boxed))
  axes = matrices(boxed, groups)
  return make_optimizer(groups, axes, steps=config.steps, **options), groups


def plan(
  model: DecoderLM,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  batch: int,
  ema: float,
  mesh: sharding.AnyMesh,
) -> tuple[Callable[[], TrainState], TrainState, TrainState]:
  """What a state at step 0 is made of; nothing is computed.

  Args:
    model: the network.
    optimizer: whose state is wanted.
    seed: of the parameters and of all later draws.
    batch: B, rows over all devices.
    ema: decay of the parameters' moving average; 0 keeps none.
    mesh: where the arrays go.

  Returns:
    A function that makes it, its shapes, and its shardings.

  Raises:
    ValueError: if the rows do not divide among the devices of the mesh.
  """
  shared = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch % shared:
    raise ValueError(
      f"batch is {batch} rows, which mesh.data x mesh.fsdp = {shared} does not divide"
    )

  def make() -> TrainState:
    key, rng = jax.random.split(jax.random.key(seed))
    params = sharding.unboxed(init_params(model, key))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      memory=model.initial_state(batch),
      rng=rng,
      ema=jax.tree.map(jnp.copy, params) if ema else (),
    )

  abstract = jax.eval_shape(make)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(seed)))
  params = sharding.parameter_shardings(boxed, mesh)
  whole = sharding.replicated(mesh)
  shardings = TrainState(
    step=whole,
    params=params,
    opt_state=sharding.like_parameters(
      abstract.opt_state, abstract.params, params, mesh
    ),
    memory=sharding.memory_shardings(abstract.memory, mesh),
    rng=whole,
    ema=params if ema else (),
  )
  return make, abstract, shardings


def init_state(
  model: DecoderLM,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  batch: int,
  ema: float,
  mesh: sharding.AnyMesh,
) -> tuple[TrainState, TrainState]:
  """A state at step 0, born sharded, and its shardings; arguments as of `plan`."""
  make, _, shardings = plan(
    model, optimizer, seed=seed, batch=batch, ema=ema, mesh=mesh
  )
  return jax.jit(make, out_shardings=shardings)(), shardings
