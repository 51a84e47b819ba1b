"""AdamW, or Muon for matrices; warm-up, cosine, auxiliary gradients clipped apart."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from cached_tx.train.accumulation import Accumulate, Stage, stages

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


def matrices(boxed: Any, labels: Any) -> Any:
  """Which parameters are matrices between two activations, and which axes they map.

  Args:
    boxed: parameters in boxes with their logical axis names.
    labels: MAIN or AUXILIARY for each.

  Returns:
    A pytree like the parameters: the axes that a kernel sums over and those that it
    makes, for Muon; None for embeddings, biases, gates, and what an auxiliary loss
    trains. Axes of stacked layers are neither.
  """

  def split(path, box, label):
    name = str(getattr(path[-1], "key", path[-1]))
    if name != "kernel" or label == AUXILIARY or not isinstance(box, nn.Partitioned):
      return None
    axes = [i for i, axis in enumerate(box.names) if axis != "layers"]
    if len(axes) < 2:
      return None
    inputs = len(axes) - 1 if box.names[-1] == "embed" else 1
    return optax.contrib.MuonDimensionNumbers(
      tuple(axes[:inputs]), tuple(axes[inputs:])
    )

  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree_util.tree_map_with_path(split, boxed, labels, is_leaf=is_box)


def make_optimizer(
  labels: Any,
  axes: Any = None,
  *,
  steps: int,
  peak: float,
  muon: float,
  warmup: int,
  floor: float,
  decay: float,
  b1: float,
  b2: float,
  clip: float,
  accumulate: Accumulate,
) -> optax.GradientTransformation:
  """The optimiser of a config's section `optimizer`.

  Args:
    labels: a pytree like the parameters, of MAIN and AUXILIARY: the parameters that
      an auxiliary loss trains are clipped by a norm of their own, or a large auxiliary
      gradient would shrink the model's.
    axes: as of `matrices`; needed for Muon.
    steps: training steps, before accumulation.
    peak: largest learning rate of AdamW.
    muon: largest learning rate of Muon (Jordan et al., 2024: momentum made
      orthogonal), which then trains the matrices; 0 leaves them to AdamW.
    warmup: updates of linear warm-up.
    floor: learning rate at the end.
    decay: weight decay of kernels and embeddings, times the learning rate; with Muon,
      of the matrices alone.
    b1: decay of the first moment.
    b2: decay of the second moment.
    clip: largest global norm of each group's gradient; 0 does not clip.
    accumulate: steps whose gradients are averaged into one update; or pairs (step,
      every): from that step on, so many. Schedules count updates.

  Raises:
    ValueError: naming the key, for a value out of its range.
  """
  plan = stages(accumulate, steps)
  if clip < 0:
    raise ValueError(f"optimizer.clip is {clip}; it is a norm: 0 (off) or more")
  updates = sum(stage.updates for stage in plan)
  rate = schedule(updates, peak, warmup, floor)
  parts = []
  if clip:
    groups = {name: optax.clip_by_global_norm(clip) for name in (MAIN, AUXILIARY)}
    parts.append(optax.partition(groups, labels))
  if muon:
    parts.append(
      optax.contrib.muon(
        schedule(updates, muon, warmup, floor * muon / peak),
        adam_learning_rate=rate,
        adam_b1=b1,
        adam_b2=b2,
        weight_decay=decay,
        weight_decay_mask=decays,
        muon_weight_dimension_numbers=axes,
      )
    )
  else:
    parts.append(optax.adamw(rate, b1, b2, eps=1e-8, weight_decay=decay, mask=decays))
  optimizer = optax.chain(*parts)
  if any(stage.every > 1 for stage in plan):
    optimizer = optax.MultiSteps(optimizer, _every(plan)).gradient_transformation()
  return optimizer


def _every(plan: tuple[Stage, ...]) -> int | Callable[[jax.Array], jax.Array]:
  """Steps of the next update, by the number of updates before it."""
  if len(plan) == 1:
    return plan[0].every
  ends = np.cumsum([stage.updates for stage in plan])[:-1]
  counts = np.array([stage.every for stage in plan])

  def count(update: jax.Array) -> jax.Array:
    stage = jnp.searchsorted(jnp.asarray(ends), update, side="right")
    return jnp.asarray(counts)[stage]

  return count


def group_norms(grads: Any, labels: Any) -> dict[str, jax.Array]:
  """The gradient's global norm, and that of the auxiliary group where there is one."""
  pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(labels), strict=True))
  norms = {}
  for name, key in ((MAIN, "grad_norm"), (AUXILIARY, "auxiliary_grad_norm")):
    own = [g for g, label in pairs if label == name]
    if own:
      norms[key] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in own))
  return norms
