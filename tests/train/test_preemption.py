"""A signal asks; a second one commands."""

import os
import signal

import pytest

from cached_tx.train.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_flag(number):
  before = signal.getsignal(number)
  with Preemption() as preemption:
    assert not preemption.reached(0)
    os.kill(os.getpid(), number)
    assert preemption.reached(1) and preemption.requested
    assert signal.getsignal(number) == before  # the second one is not caught
  assert signal.getsignal(number) == before


def test_handlers_are_put_back():
  before = signal.getsignal(signal.SIGINT)
  with Preemption():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before


def test_second_interrupt_stops():
  # A shell starts what it puts into the background with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
      os.kill(os.getpid(), signal.SIGINT)
      assert preemption.requested
      os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
