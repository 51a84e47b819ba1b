"""The smallest run that trains every kind of memory: a config like those of configs/.

cached-tx train --config tests/train/toy.py:xl --config.data.path=FOLDER --workdir DIR

Dropout, a moving average and, with `write_text`, documents that begin inside segments
are on. A new kind is one line of MEMORIES.
"""

import random
from pathlib import Path

from ml_collections import ConfigDict

from configs import quickstart

MEMORIES = {
  "none": {},
  "xl": {"size": 12},
  "compressive": {
    "size": 8,
    "compressed": 6,
    "rate": 2,
    "compressor": "conv",
    "loss": "attention",
  },
  "grc": {"size": 5, "ratio": 0.5},
  "favor": {"features": 8, "chunk": 4},
}
SEGMENT, SAVE_EVERY = 8, 7


def get_config(kind="none"):
  c = quickstart.get_config("smoke").unlock()
  c.seed, c.steps, c.batch, c.log_every = 3, 30, 4, 1
  c.segment, c.segments, c.tbptt = SEGMENT, 2, 2
  c.data.update({"name": "text", "path": ""})
  c.model.update({"layers": 2, "width": 16, "heads": 2, "mlp": 32, "dropout": 0.1})
  c.memory = ConfigDict({"kind": kind, **MEMORIES[kind]})
  c.optimizer.update({"peak": 1e-2, "warmup": 3, "ema": 0.9})
  c.eval.update({"every": 10, "batch": 4, "segments": 2})
  c.save.update({"every": SAVE_EVERY, "keep": 3})
  return c.lock()


def write_text(folder: Path, seed: int = 0) -> Path:
  """Writes 150 documents of 3 to 40 bytes: most of them begin inside a segment."""
  rng = random.Random(seed)
  folder.mkdir()
  for i in range(150):
    length = rng.randint(3, 40)
    text = "".join(rng.choice("abcdefgh \n") for _ in range(length))
    (folder / f"{i:03}.txt").write_text(text)
  return folder
