"""Floating-point operations, counted in the traced program."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from cached_tx.layers import has_option
from cached_tx.models import DecoderLM
from cached_tx.train import sharding
from cached_tx.train.state import init_params
from cached_tx.types import Segment


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
  """Floating-point operations of all matrix products and convolutions in `fn(*args)`.

  Counted in the traced program: a multiplication and an addition are 2, the body of a
  scan counts as often as it runs, of the branches of a condition the dearest one
  counts, and a loop whose length is not known counts once. What no result depends on
  does not count. Nothing runs.

  Args:
    fn: a function of pytrees.
    args: arrays, or jax.ShapeDtypeStruct in their place.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(needed)


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, given = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _dot(equation)
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = kernel[given["dimension_numbers"].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // features
    else:
      inner = [_count(sub) for sub in _inner(given)]
      times = given["length"] if name == "scan" else 1
      total += times * (max(inner, default=0) if name == "cond" else sum(inner))
  return total


def _dot(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _inner(given: dict[str, Any]) -> Iterator[Any]:
  """The programs inside an equation."""
  for value in given.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _dense(model: DecoderLM) -> DecoderLM:
  """The same with all scores held: how many blocks are left out, data decide."""
  exact = any(has_option(memory, "attention") for memory in model.memories)
  return model.clone(attention="dense") if exact else model


def forward_flops(model: DecoderLM, segments: int = 1) -> float:
  """FLOPs per token of logits and memory, by the parallel pass over `segments`.

  Of all pairs of queries and keys, also those that attention by blocks leaves out.
  """
  model = _dense(model)

  def forward(*args):
    return run(model, *args)[:2]

  tokens = model.segment * segments
  return count_flops(forward, *arguments(model, 1, segments)) / tokens


def training_flops(model: DecoderLM, segments: int) -> float:
  """FLOPs per token of a training step: forward, auxiliary losses, backward, remat.

  Without auxiliary losses and remat it is near 3 times the forward pass. Pairs are
  counted as there.
  """
  model = _dense(model)

  def backward(params, *rest):
    def total(params):
      logits, _, losses = run(model, params, *rest)
      return logits.sum() + sum(loss.sum() for loss in losses.values())

    return jax.grad(total)(params)

  tokens = model.segment * segments
  return count_flops(backward, *arguments(model, 1, segments)) / tokens


def arguments(model: DecoderLM, rows: int, segments: int) -> tuple[Any, ...]:
  """Shapes of parameters, tokens, starts and state."""
  shape = (rows, model.segment * segments)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return (
    sharding.unboxed(boxed),
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct(shape, bool),
    jax.eval_shape(lambda: model.initial_state(rows)),
  )


def run(model: DecoderLM, params: Any, tokens: Any, starts: Any, state: Any) -> Any:
  """The forward pass: logits, state, losses."""
  return model.apply({"params": params}, tokens, state, Segment(starts))
