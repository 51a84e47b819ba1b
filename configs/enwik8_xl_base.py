r"""Transformer-XL base on enwik8.

cached-tx train --config configs/enwik8_xl_base.py \
    --config.data.path=FILE --workdir DIR
cached-tx train --config configs/enwik8_xl_base.py:smoke --workdir DIR
cached-tx evaluate --workdir DIR --rows 10 --set segment=80 \
    --set memory.size=2100 --set memory.clamp=820 --set memory.same_length=tensorflow

Dai et al., 2019, arXiv:1901.02860: 12 layers, 41M parameters, 1.06 bits per character
on the test split, evaluated with segment 80, memory 2,100, clamp 820 and same_length;
Adam, 400,000 steps of 22 rows (24 in the TensorFlow script, as here), no warm-up,
dropout 0.1 (none on attention weights), clip 0.25; one pair of biases u and v. Differs:
newlines are kept and predicted; how weights are drawn.

Result: not run; :smoke is run by the tests.
"""

from ml_collections import ConfigDict


def get_config(mode="full"):
  c = ConfigDict()
  c.seed = 0
  c.steps = 400_000
  c.batch = 24  # rows over all devices
  c.segment = 512  # tokens between two updates of the memory
  c.segments = 1  # per step
  c.tbptt = 1  # segments that a gradient spans
  c.data = ConfigDict(dict(name="enwik8", path="", tokenizer="bytes", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=12,
      width=512,
      heads=8,
      mlp=2048,
      activation="relu",
      positions="relative",
      dropout=0.1,
      dtype="bfloat16",
      remat="dots",
      unroll=1,
      pattern=(),
      norm="post",
      norm_bias=True,
      norm_epsilon=1e-5,  # 1e-12 in the TensorFlow code
      output_bias=True,
      attention_dropout=0.0,
      tied_biases=True,  # one pair of u and v for all layers
    )
  )
  c.memory = ConfigDict(
    dict(
      kind="xl",
      size=512,
      clamp=0,  # largest distance of relative positions; 0: any
      same_length="off",  # pytorch or tensorflow: all queries see as many keys
      start="empty",  # or zeros, which are attended to
    )
  )
  c.optimizer = ConfigDict(
    dict(
      peak=2.5e-4,
      muon=0.0,
      warmup=0,
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
  c.eval = ConfigDict(dict(every=4_000, batch=24, segments=0))
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
