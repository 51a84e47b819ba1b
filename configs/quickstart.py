r"""Compressive Transformer on the bundled text: what `make train` runs.

python -m cached_tx.main train --config configs/quickstart.py --workdir DIR
python -m cached_tx.main train --config configs/quickstart.py:smoke --workdir DIR
"""

from ml_collections import ConfigDict


def get_config(mode="full"):
  c = ConfigDict()
  c.seed = 0
  c.steps = 360
  c.batch = 32  # rows over all devices
  c.segment = 64  # tokens between two updates of the memory
  c.segments = 1  # per step
  c.tbptt = 1  # segments that a gradient spans
  c.data = ConfigDict(dict(name="web_en", path="", tokenizer="bytes", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=3,
      width=128,
      heads=2,
      mlp=512,
      activation="relu2",
      positions="rotary",
      dropout=0.0,
      dtype="float32",
      remat="none",
      unroll=1,
      pattern=(),
    )
  )
  c.memory = ConfigDict(
    dict(
      kind="compressive",
      size=64,
      compressed=64,
      rate=4,
      compressor="conv",
      loss="attention",
    )
  )
  c.optimizer = ConfigDict(
    dict(
      peak=3e-3,
      muon=0.02,
      warmup=40,
      floor=1e-5,
      decay=0.1,
      b1=0.9,
      b2=0.98,
      clip=1.0,
      accumulate=1,
      ema=0.0,
    )
  )
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
  c.eval = ConfigDict(dict(every=180, batch=32, segments=32))
  c.save = ConfigDict(dict(every=180, keep=2))
  c.log_every = 10
  if mode == "smoke":
    c.steps, c.batch, c.segment = 20, 8, 32
    c.model.update(dict(layers=2, width=32, heads=2, mlp=64))
    c.memory.update(dict(size=32, compressed=16))
    c.optimizer.warmup = 5
    c.eval.update(dict(every=10, batch=8, segments=4))
    c.save.every = 10
  elif mode != "full":
    raise ValueError(f"unknown mode {mode!r}: full or smoke")
  return c.lock()
