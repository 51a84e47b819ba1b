"""AdamW with warm-up and cosine decay, auxiliary gradients clipped apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

AUXILIARY = "auxiliary"
MAIN = "main"


def schedule(
  steps: int, peak: float, warmup: int, floor: float
) -> Callable[[jax.Array], jax.Array]:
  """Linear from 0 to `peak` in `warmup` updates, then a cosine to `floor` at `steps`.

  Raises:
    ValueError: if the warm-up leaves no step for the decay.
  """
  if not 0 <= warmup < max(steps, 1):
    raise ValueError(
      f"optimizer.warmup is {warmup}; it must be at least 0 and below the number of "
      f"updates, {steps}: change optimizer.warmup or steps"
    )
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, floor)


def decays(params: Any) -> Any:
  """True for kernels and embeddings: what weight decay shrinks."""

  def name(path, _):
    return str(getattr(path[-1], "key", path[-1])) in ("kernel", "embedding")

  return jax.tree_util.tree_map_with_path(name, params)


def make_optimizer(
  labels: Any,
  *,
  steps: int,
  peak: float,
  warmup: int,
  floor: float,
  decay: float,
  b1: float,
  b2: float,
  clip: float,
  accumulate: int,
) -> optax.GradientTransformation:
  """The optimiser of a config's section `optimizer`.

  Args:
    labels: a pytree like the parameters, of MAIN and AUXILIARY: the parameters that
      an auxiliary loss trains are clipped by a norm of their own, or a large auxiliary
      gradient would shrink the model's.
    steps: training steps, before accumulation.
    peak: largest learning rate.
    warmup: updates of linear warm-up.
    floor: learning rate at the end.
    decay: weight decay of kernels and embeddings, times the learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    clip: largest global norm of each group's gradient; 0 does not clip.
    accumulate: steps whose gradients are averaged into one update.

  Raises:
    ValueError: naming the key, for a value out of its range.
  """
  if accumulate < 1:
    raise ValueError(
      f"optimizer.accumulate is {accumulate}; it counts steps: 1 or more"
    )
  if clip < 0:
    raise ValueError(f"optimizer.clip is {clip}; it is a norm: 0 (off) or more")
  updates = -(-steps // accumulate)
  rate = schedule(updates, peak, warmup, floor)
  parts = []
  if clip:
    groups = {name: optax.clip_by_global_norm(clip) for name in (MAIN, AUXILIARY)}
    parts.append(optax.partition(groups, labels))
  parts.append(optax.adamw(rate, b1, b2, eps=1e-8, weight_decay=decay, mask=decays))
  optimizer = optax.chain(*parts)
  if accumulate > 1:
    optimizer = optax.MultiSteps(optimizer, accumulate).gradient_transformation()
  return optimizer


def group_norms(grads: Any, labels: Any) -> dict[str, jax.Array]:
  """The gradient's global norm, and that of the auxiliary group where there is one."""
  pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(labels), strict=True))
  norms = {}
  for name, key in ((MAIN, "grad_norm"), (AUXILIARY, "auxiliary_grad_norm")):
    own = [g for g, label in pairs if label == name]
    if own:
      norms[key] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in own))
  return norms
