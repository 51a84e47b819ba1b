r"""Transformer-XL base on WikiText-103.

cached-tx train --config configs/wikitext103_xl_base.py \
    --config.data.path=FOLDER --workdir DIR
cached-tx train --config configs/wikitext103_xl_base.py:smoke --workdir DIR
cached-tx evaluate --workdir DIR --ordered --rows 10 --set segment=64 \
    --set memory.size=640 --set memory.clamp=400 --set memory.same_length=tensorflow

Dai et al., 2019, arXiv:1901.02860: 16 layers, 151M parameters, test perplexity 24.0,
evaluated with segment 64, memory 640, clamp 400 and same_length; Adam, 200,000 steps of
60 rows, no warm-up, dropout 0.1 (none on attention weights), clip 0.25; adaptive
softmax with cutoffs 20k, 40k and 200k; biases u and v for each layer, as in its
TensorFlow script. Differs: all clusters are computed for every token; every article
begins with a BOS token and an empty memory; how weights are drawn.

Result: not run; :smoke is run by the tests.
"""

from ml_collections import ConfigDict


def get_config(mode="full"):
  c = ConfigDict()
  c.seed = 0
  c.steps = 200_000
  c.batch = 60  # rows over all devices
  c.segment = 150  # tokens between two updates of the memory
  c.segments = 1  # per step
  c.tbptt = 1  # segments that a gradient spans
  c.data = ConfigDict(dict(name="wikitext103", path="", tokenizer="words", vocab=""))
  c.model = ConfigDict(
    dict(
      layers=16,
      width=410,
      heads=10,
      mlp=2100,
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
      tied_biases=False,  # the PyTorch code has one pair of u and v for all layers
      vocabulary=dict(  # ids fall from frequent to rare
        cutoffs=(20_000, 40_000, 200_000),
      ),
    )
  )
  c.memory = ConfigDict(
    dict(
      kind="xl",
      size=150,
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
  c.eval = ConfigDict(dict(every=4_000, batch=60, segments=0))
  c.save = ConfigDict(dict(every=4_000, keep=2))
  c.log_every = 100
  if mode == "smoke":
    c.steps, c.batch, c.segment, c.log_every = 4, 8, 16, 1
    c.data.update(dict(name="web_en", path="", tokenizer="bytes", vocab=""))
    c.model.update(dict(layers=2, width=32, heads=2, mlp=64))
    c.model.vocabulary.update(dict(cutoffs=(64, 128, 192)))
    c.memory.update(dict(size=16))
    c.optimizer.update(dict(peak=1e-2, warmup=2))
    c.eval.update(dict(every=2, batch=8, segments=2))
    c.save.every = 2
  elif mode != "full":
    raise ValueError(f"unknown mode {mode!r}: full or smoke")
  return c.lock()
