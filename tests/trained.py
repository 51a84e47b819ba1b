"""A tiny trained run, made once for all tests that need one."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from cached_tx.train.loop import train
from configs.quickstart import get_config


def tiny() -> ConfigDict:
  """The quickstart, smaller than its smoke variant, over eight devices."""
  c = get_config("smoke")
  with c.unlocked():
    c.steps, c.segment, c.segments, c.log_every = 4, 8, 2, 1
    c.model.update({"layers": 1, "width": 8, "heads": 1, "mlp": 8})
    c.memory.update({"size": 8, "compressed": 4})
    c.optimizer.warmup = 1
    c.eval.update({"every": 2, "batch": 256, "segments": 2})
    c.save.every = 2
    c.mesh.data = 8
  return c.lock()


@functools.cache
def workdir() -> Path:
  """The folder of the run; not to be written to."""
  above = Path(tempfile.mkdtemp(prefix="cached_tx_test_"))
  atexit.register(shutil.rmtree, above, ignore_errors=True)
  folder = above / "run"
  train(tiny(), folder)
  return folder
