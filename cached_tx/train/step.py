"""One update."""

from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cached_tx.models import DecoderLM
from cached_tx.train.optimizer import group_norms
from cached_tx.train.state import TrainState
from cached_tx.types import Logits, Segment, Tokens


def cross_entropy(
  logits: Logits, targets: Tokens, weights: Float[Array, "B L"]
) -> Float[Array, ""]:
  """Mean loss in nats over the targets of weight 1; 0 if there are none."""
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(loss * weights) / jnp.maximum(weights.sum(), 1)


def train_step(
  state: TrainState,
  batch: Any,
  *,
  model: DecoderLM,
  optimizer: optax.GradientTransformation,
  labels: Any,
  ema: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update. No gradient enters `state.memory`: it arrives as data.

  Args:
    state: before the step; donated.
    batch: tokens, targets, weights and starts, B T, T a multiple of the segment.
    model: the network.
    optimizer: of the parameters.
    labels: as of `make_optimizer`.
    ema: decay of the parameters' moving average; 0 keeps none.

  Returns:
    The state after it, and metrics: loss in nats per token, auxiliary losses, norms.
  """
  B, T = batch.tokens.shape
  finished = B * (T // model.segment)

  def loss_fn(params):
    out: Any = model.apply(
      {"params": params},
      batch.tokens,
      state.memory,
      Segment(batch.starts),
      deterministic=False,
      step=state.step,
      rngs={"dropout": jax.random.fold_in(state.rng, state.step)},
    )
    logits, memory, losses = out
    loss = cross_entropy(logits, batch.targets, batch.weights)
    losses = {name: rows.sum() / finished for name, rows in losses.items()}
    return loss + sum(losses.values()), (loss, losses, memory)

  grad_fn = jax.grad(loss_fn, has_aux=True)
  grads, (loss, losses, memory) = grad_fn(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  average = state.ema
  if ema:
    average = optax.incremental_update(params, state.ema, 1 - ema)
  state = state.replace(
    step=state.step + 1, params=params, opt_state=opt_state, memory=memory, ema=average
  )
  return state, {"loss": loss, **losses, **group_norms(grads, labels)}


def compiled_step(shardings: TrainState, metrics_sharding: Any, **static: Any):
  """The jitted step, its state donated and kept in place."""
  step = wraps(train_step)(partial(train_step, **static))  # keeps its name in logs
  return jax.jit(step, out_shardings=(shardings, metrics_sharding), donate_argnums=0)
