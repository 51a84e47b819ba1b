"""Leaving a run at a step boundary when the machine is taken away."""

import logging
import signal

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


class Preemption:
  """Turns SIGTERM and SIGINT into a flag that the training loop reads.

      with Preemption() as preemption:
        for step in ...:
          ...
          if preemption.reached(step):
            break  # and save

  A second signal acts as if this class were not there. With jax.distributed
  initialised, JAX itself catches SIGTERM and all processes agree on one step;
  `reached` must then be called at every step by every process. Ctrl-C is left
  alone in that case: it reaches one process only.

  Attributes:
    requested: whether a signal has come (to any process, once `reached` says so).
  """

  def __init__(self):
    self.requested = False
    self._distributed = jax.distributed.is_initialized()
    self._previous = {}

  def __enter__(self) -> "Preemption":
    if not self._distributed:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception):
    self._restore()

  def reached(self, step: int) -> bool:
    """Whether to save and leave after `step`, the same answer in every process."""
    if self._distributed and not self.requested:
      self.requested = multihost_utils.reached_preemption_sync_point(step)
    return self.requested

  def _handle(self, number, frame):
    del frame
    self.requested = True
    self._restore()
    _log.warning(
      "%s: saving after this step, then leaving; a second signal stops at once",
      signal.Signals(number).name,
    )

  def _restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
