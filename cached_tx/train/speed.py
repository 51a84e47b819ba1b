"""Tokens per second of training: one definition for all who show it."""

import time
from typing import NamedTuple


class Measured(NamedTuple):
  """Tokens of the steps that were done, and the seconds that these took."""

  tokens: float = 0.0
  seconds: float = 0.0

  @property
  def rate(self) -> float | None:
    """Tokens per second; None where nothing was measured."""
    return self.tokens / self.seconds if self.tokens and self.seconds else None


class Speed:
  """Measures training alone: neither the first step, which compiles, nor pauses.

  A time is taken only when a step is known to be done, because its numbers are there:
  when a step was dispatched says nothing of when it ran.

  Attributes:
    total: since the first step.
  """

  def __init__(self, tokens_per_step: int):
    """Counts so many tokens for a step: over all rows and processes."""
    self.total = Measured()
    self._tokens_per_step = tokens_per_step
    self._taken = Measured()
    self._began: float | None = None  # when the newest step counted was done
    self._done = 0

  def begin(self, done: int):
    """`done` steps are done and nothing runs: from here on it counts."""
    self._began, self._done = time.monotonic(), done

  def reached(self, done: int):
    """`done` steps are done, as was just seen."""
    if self._began is None or done <= self._done:
      return
    now = time.monotonic()
    self.total = Measured(
      self.total.tokens + (done - self._done) * self._tokens_per_step,
      self.total.seconds + now - self._began,
    )
    self._began, self._done = now, done

  def pause(self):
    """What follows is no training, until `go_on`; nothing runs at either."""
    self._began = None

  def go_on(self):
    """Training continues."""
    self._began = time.monotonic()

  def take(self) -> Measured:
    """What was measured since the last call."""
    before, self._taken = self._taken, self.total
    return Measured(
      self.total.tokens - before.tokens, self.total.seconds - before.seconds
    )
