"""Work for several processes, with results in order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_order(
  make: Callable[[Any], Result], items: Iterable[Any], processes: int
) -> Iterator[Result]:
  """Yields `make` of each item, in order, whatever the number of processes.

  Args:
    make: a function that can be pickled, as its results can.
    items: any number of them, without end too; few are looked at in advance.
    processes: that work at once; with 1 it is this one. They end with this one,
      however that ends.
  """
  if processes < 2:
    yield from map(make, items)
    return
  items = iter(items)
  pool = ProcessPoolExecutor(
    processes, get_context("spawn"), initializer=_end_with_parent
  )
  try:
    ahead: deque[Future] = deque(
      pool.submit(make, item) for item in islice(items, processes + 1)
    )
    while ahead:
      result = ahead.popleft().result()
      ahead.extend(pool.submit(make, item) for item in islice(items, 1))
      yield result
  finally:
    pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
  """Without this, a killed process would leave its workers waiting for ever."""

  def wait() -> None:
    parent = parent_process()
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
