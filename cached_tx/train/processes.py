"""Several processes as one run: joining, waiting for each other, leaving together."""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax

VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
PATIENCE = 3 * 3600  # seconds that others may take to prepare a data set, or compile
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where this process stands among those of a run.

  Attributes:
    address: HOST:PORT on which process 0 listens.
    count: number of processes.
    index: of this one.
  """

  address: str
  count: int
  index: int


def place(choice: str) -> Place | None:
  """What `choice`, or with "auto" the environment, says; None if nothing.

  Raises:
    ValueError: neither auto, off nor HOST:PORT,NUM,ID; or only some of VARIABLES.
  """
  if choice == "off":
    return None
  if choice != "auto":
    return _parsed(choice.split(","), f"--distributed={choice}")
  found = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
  if not found:
    return None
  given = " ".join(f"{name}={os.environ.get(name, '')}" for name in VARIABLES)
  return _parsed(found, given)


def _parsed(parts: list[str], given: str) -> Place:
  numbers = [int(part) for part in parts[1:] if part.isdecimal()]
  if len(parts) != 3 or len(numbers) != 2 or ":" not in parts[0]:
    raise ValueError(
      f"{given}: give --distributed=auto, off or HOST:PORT,NUM,ID (process 0's address,"
      f" the number of processes, this one's), or all of {', '.join(VARIABLES)}"
    )
  address, (count, index) = parts[0], numbers
  if index >= count:
    raise ValueError(f"{given}: process {index} is none of {count}, which count from 0")
  return Place(address, count, index)


def join(choice: str, heartbeat: int) -> None:
  """Joins the other processes of the run, if there are any.

  To be called before anything else uses JAX's devices. On a cluster that JAX knows
  (TPU pods, SLURM, Open MPI) "auto" needs nothing said.

  Args:
    choice: auto, off, or HOST:PORT,NUM,ID.
    heartbeat: seconds without a sign of life after which a process counts as dead,
      and all others end.

  Raises:
    ValueError: as `place`, or heartbeat < 1.
  """
  if heartbeat < 1:
    raise ValueError(f"--heartbeat={heartbeat} must be 1 second or more")
  own = place(choice)
  if own is not None:
    jax.distributed.initialize(
      own.address,
      own.count,
      own.index,
      cluster_detection_method="deactivate",
      heartbeat_timeout_seconds=heartbeat,
    )
  elif choice == "auto":
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    except ValueError as error:
      # Other errors are of a cluster that is there: do not train alone beside it.
      if "coordinator_address should be defined" not in str(error):
        raise


def joined() -> bool:
  """Whether this process is one of several."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def first_then_others(make: Callable[[], T]) -> T:
  """What `make` returns, made in process 0 before any other process begins.

  So files that it prepares are there for processes that share the folder.
  """
  if jax.process_count() == 1:
    return make()
  made = make() if jax.process_index() == 0 else None
  wait_for_others("process 0 has prepared its files")
  return make() if made is None else made


def wait_for_others(what: str) -> None:
  """Returns when every process has come here. Without devices, whose waits are short.

  Args:
    what: the same words in every process.
  """
  import orbax.checkpoint as ocp

  ocp.multihost.get_barrier_sync_fn()(key=what, timeout_ms=1000 * PATIENCE)


def compile_together(jitted: Any, *arguments: Any) -> None:
  """Compiles a function for these arguments, and waits until every process has.

  One process may find it in the compilation cache while another compiles for minutes;
  in its first collective the first one would wait 30 seconds (Gloo, on CPU) and fail.
  """
  if joined():
    jitted.lower(*arguments).compile()
    wait_for_others("compiled")


def assert_same(text: str, what: str) -> None:
  """Checks that every process was given the same.

  Raises:
    ValueError: in every process, if one differs from process 0.
  """
  if jax.process_count() == 1:
    return
  import hashlib

  import numpy as np
  from jax.experimental import multihost_utils

  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  others = multihost_utils.process_allgather(digest)
  wrong = [i for i, other in enumerate(others) if (other != others[0]).any()]
  if wrong:
    raise ValueError(
      f"{what} of process {', '.join(map(str, wrong))} differs from that of process 0:"
      " start every process with the same command and the same files"
    )


def leave_at_once(status: int) -> NoReturn:
  """Ends a process that failed, so that the others learn of it.

  A usual exit would wait in JAX's shutdown for processes that wait for this one.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
