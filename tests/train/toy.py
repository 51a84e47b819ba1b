"""The smallest run that trains every kind of memory: a config like those of configs/.

cached-tx train --config tests/train/toy.py:xl --config.data.path=FOLDER --workdir DIR

Dropout, a moving average and, with `write_text`, documents that begin inside segments
are on. A new kind is one line of MEMORIES.
"""

import random
from pathlib import Path

from ml_collections import ConfigDict

MEMORIES = {
  "none": dict(kind="none"),
  "xl": dict(kind="xl", size=12),
  "compressive": dict(
    kind="compressive",
    size=8,
    compressed=6,
    rate=2,
    compressor="conv",
    loss="attention",
  ),
  "grc": dict(kind="grc", size=5, ratio=0.5),
  "favor": dict(kind="favor", features=8, chunk=4),
}
SEGMENT, SAVE_EVERY = 8, 7


def get_config(kind="none"):
  c = ConfigDict()
  c.seed = 3
  c.steps = 30
  c.batch = 4
  c.segment = SEGMENT
  c.segments = 2
  c.tbptt = 2
  c.data = ConfigDict(dict(name="text", path="", tokenizer="bytes", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=2,
      width=16,
      heads=2,
      mlp=32,
      activation="gelu",
      positions="rotary",
      dropout=0.1,
      dtype="float32",
      remat="none",
      unroll=1,
      pattern=(),
    )
  )
  c.memory = ConfigDict(MEMORIES[kind])
  c.optimizer = ConfigDict(
    dict(
      peak=1e-2,
      muon=0.0,
      warmup=3,
      floor=1e-4,
      decay=0.1,
      b1=0.9,
      b2=0.98,
      clip=1.0,
      accumulate=1,
      ema=0.9,
    )
  )
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
  c.eval = ConfigDict(dict(every=10, batch=4, segments=2))
  c.save = ConfigDict(dict(every=SAVE_EVERY, keep=3))
  c.log_every = 1
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
