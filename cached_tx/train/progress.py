"""One line that tells how far a run is."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  TextColumn,
  TimeElapsedColumn,
)
from rich.progress import Progress as Bar

_PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class Progress:
  """A live line on a terminal, plain lines now and then elsewhere (stderr).

  Attributes:
    speed: tokens per second since the first step; None while unknown.
  """

  def __init__(self, total: int, start: int = 0, console: Console | None = None):
    self.speed: float | None = None
    self._total = total
    self._console = console or Console(stderr=True, highlight=False)
    self._began: tuple[float, int] | None = None
    self._printed = -_PLAIN_SECONDS
    self._bar: Any = None
    if self._console.is_terminal:
      self._bar = Bar(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task(
        "", total=total, completed=start, text="compiling"
      )
      self._bar.start()
    elif start < total:
      self.note(f"step {start}/{total}  compiling")  # nothing follows for a while

  def update(self, done: int, summary: str):
    """Shows that `done` steps are finished."""
    now = time.monotonic()
    if self._began is None:
      self._began = (now, done)  # the first step, which compiles, tells nothing
    text = "  ".join(filter(None, [summary, self._speed(), self._left(now, done)]))
    if self._bar is not None:
      self._bar.update(self._task, completed=done, text=text)
    elif now - self._printed >= _PLAIN_SECONDS or done == self._total:
      self._printed = now
      self._console.print(f"step {done}/{self._total}  {text}", soft_wrap=True)

  def note(self, text: str):
    """Prints a line that stays."""
    self._console.print(text, soft_wrap=True)

  def close(self):
    """Ends the live line."""
    if self._bar is not None:
      self._bar.stop()

  def _speed(self) -> str:
    return f"{self.speed:,.0f} tokens/s" if self.speed else ""

  def _left(self, now: float, done: int) -> str:
    then, before = self._began or (now, done)
    if done <= before:
      return ""
    left = (now - then) / (done - before) * (self._total - done)
    return f"{duration(left)} left"


def duration(seconds: float) -> str:
  """Seconds as people say them: 42s, 3m 05s, 2h 10m, 3d 04h."""
  s = round(seconds)
  if s < 60:
    return f"{s}s"
  if s < 3600:
    return f"{s // 60}m {s % 60:02}s"
  if s < 86400:
    return f"{s // 3600}h {s // 60 % 60:02}m"
  return f"{s // 86400}d {s // 3600 % 24:02}h"
