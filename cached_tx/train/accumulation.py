"""How many training steps make one update, and from when on."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Accumulate = int | Sequence[Any]  # a number, or pairs of numbers


class Stage(NamedTuple):
  """Steps of training whose gradients are averaged `every` at a time."""

  first: int
  steps: int
  every: int

  @property
  def updates(self) -> int:
    """Updates that its steps make."""
    return self.steps // self.every


def stages(accumulate: Accumulate, steps: int) -> tuple[Stage, ...]:
  """The stages of `steps` training steps.

  Args:
    accumulate: steps to an update; or pairs (step, every), the first of step 0: from
      that step on, so many.
    steps: of training.

  Raises:
    ValueError: for counts below 1, or stages that are out of order or that do not end
      with an update.
  """
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
  is_pair = lambda x: isinstance(x, Sequence) and len(x) == 2 and all(map(whole, x))
  plan: Any = ((0, accumulate),) if whole(accumulate) else accumulate
  if not isinstance(plan, Sequence) or not plan or not all(map(is_pair, plan)):
    raise ValueError(
      f"optimizer.accumulate is {accumulate}; it must be a whole number of steps, or "
      "pairs (step, every) of them"
    )
  firsts = [first for first, _ in plan]
  ends = [*firsts[1:], steps]
  if firsts[0] != 0 or any(a >= b for a, b in pairwise([*firsts, steps])):
    raise ValueError(
      f"optimizer.accumulate is {accumulate}; its stages must begin with step 0, each "
      f"later than the one before it and earlier than the end, steps = {steps}"
    )
  found = []
  for (first, every), end in zip(plan, ends, strict=True):
    if every < 1:
      raise ValueError(f"optimizer.accumulate is {every}; it counts steps: 1 or more")
    if (end - first) % every:
      what = f"the {end - first} steps from {first} to {end}"
      what = what if len(firsts) > 1 else f"steps = {steps}"
      raise ValueError(
        f"optimizer.accumulate is {every}, which does not divide {what}: the last "
        "gradients would be dropped"
      )
    found.append(Stage(first, end - first, every))
  return tuple(found)
