r"""One small model per kind of memory, equal in all else: the table of the README.

python -m benchmarks.memories
python -m cached_tx.main train --config configs/compare.py:grc --workdir DIR

Every kind attends 32 slots besides its segment of 32 tokens, where it has slots: none
has neither, favor has running sums, and xl+favor has them in the middle layer. tbptt is
2 for all, since grc learns by it alone.
"""

from ml_collections import ConfigDict

FAVOR = dict(
  kind="favor",
  features=64,
  kernel="positive",
  projection="orthogonal",
  chunk=64,
  seed=0,
  redraw=0,  # steps between two draws of the rows; 0: never
)
MEMORIES = {
  "none": dict(kind="none"),
  "xl": dict(kind="xl", size=32),
  "compressive": dict(
    kind="compressive",
    size=16,
    compressed=16,
    rate=4,
    compressor="conv",
    loss="attention",
  ),
  "grc": dict(kind="grc", size=32, ratio=0.5),
  "favor": FAVOR,
  "xl+favor": dict(
    xl=dict(kind="xl", size=32),
    favor=FAVOR,
  ),
}
PATTERNS = {"xl+favor": ("xl", "favor", "xl")}  # of the three layers


def get_config(mode="xl"):
  if mode not in MEMORIES:
    raise ValueError(f"unknown mode {mode!r}: one of {', '.join(MEMORIES)}")
  c = ConfigDict()
  c.seed = 0
  c.steps = 200
  c.batch = 16  # rows over all devices
  c.segment = 32  # tokens between two updates of the memory
  c.segments = 4  # per step
  c.tbptt = 2  # segments that a gradient spans
  c.data = ConfigDict(dict(name="web_en", path="", tokenizer="bytes", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=3,
      width=128,
      heads=4,
      mlp=512,
      activation="relu2",
      positions="rotary",
      dropout=0.0,
      dtype="float32",
      remat="none",
      unroll=1,
      pattern=PATTERNS.get(mode, ()),
    )
  )
  c.memory = ConfigDict(MEMORIES[mode])
  c.optimizer = ConfigDict(
    dict(
      peak=4e-3,
      muon=0.02,
      warmup=20,
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
  c.eval = ConfigDict(dict(every=0, batch=16, segments=0))
  c.save = ConfigDict(dict(every=0, keep=1))
  c.log_every = 20
  return c.lock()
