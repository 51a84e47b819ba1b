r"""Transformer-XL large on enwik8.

cached-tx train --config configs/enwik8_xl_large.py \
    --config.data.path=FILE --workdir DIR
cached-tx train --config configs/enwik8_xl_large.py:smoke --workdir DIR
cached-tx evaluate --workdir DIR --rows 10 --set segment=128 \
    --set memory.size=3800 --set memory.clamp=1000 --set memory.same_length=tensorflow

Dai et al., 2019, arXiv:1901.02860: 24 layers, 277M parameters, 0.99 bits per
character on the test split, evaluated with segment 128, memory 3,800, clamp 1,000
and same_length; Adam, 400,000 steps of 64 rows, 4,000 of warm-up, dropout 0.15, clip
0.25; one pair of biases u and v. Differs: newlines are kept and predicted; how weights
are drawn.

Result: not run; :smoke is run by the tests.
"""

from ml_collections import ConfigDict


def get_config(mode="full"):
  c = ConfigDict()
  c.seed = 0
  c.steps = 400_000
  c.batch = 64  # rows over all devices
  c.segment = 768  # tokens between two updates of the memory
  c.segments = 1  # per step
  c.tbptt = 1  # segments that a gradient spans
  c.data = ConfigDict(dict(name="enwik8", path="", tokenizer="bytes", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=24,
      width=1024,
      heads=8,
      mlp=3072,
      activation="relu",
      positions="relative",
      dropout=0.15,
      dtype="bfloat16",
      remat="dots",
      unroll=1,
      pattern=(),
      norm="post",
      norm_bias=True,
      norm_epsilon=1e-5,  # 1e-12 in the TensorFlow code
      output_bias=True,
      tied_biases=True,  # one pair of u and v for all layers
    )
  )
  c.memory = ConfigDict(
    dict(
      kind="xl",
      size=768,
      clamp=0,  # largest distance of relative positions; 0: any
      same_length="off",  # pytorch or tensorflow: all queries see as many keys
      start="empty",  # or zeros, which are attended to
    )
  )
  c.optimizer = ConfigDict(
    dict(
      peak=2.5e-4,
      muon=0.0,
      warmup=4_000,
      floor=0.0,
      decay=0.0,
      b1=0.9,
      b2=0.999,
      clip=0.25,
      accumulate=1,
      ema=0.0,
    )
  )
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
  c.eval = ConfigDict(dict(every=4_000, batch=64, segments=0))
  c.save = ConfigDict(dict(every=4_000, keep=2))
  c.log_every = 100
  if mode == "smoke":
    c.steps, c.batch, c.segment, c.log_every = 4, 8, 16, 1
    c.data.update(dict(name="web_en", path="", tokenizer="bytes", vocab=""))
    c.model.update(dict(layers=2, width=32, heads=2, mlp=64))
    c.memory.update(dict(size=16))
    c.optimizer.update(dict(peak=1e-2, warmup=2))
    c.eval.update(dict(every=2, batch=8, segments=2))
    c.save.every = 2
  elif mode != "full":
    raise ValueError(f"unknown mode {mode!r}: full or smoke")
  return c.lock()
