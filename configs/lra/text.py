r"""Byte-level IMDb reviews, length 1,000, with the published settings.

cached-tx lra train --config configs/lra/text.py:bigbird --workdir DIR

After the model: cached (a gated recurrent cache beside every attention),
smoke (a few small steps). Results are often quoted of length 4,000:
--config.task.length=4000.
"""

from ml_collections import ConfigDict

ATTENTION = {  # options that differ from an attention's own defaults
  "local": dict(block=50),
  "sparse": dict(block=50, summary=10),
  "sinkhorn": dict(block=50),
  "bigbird": dict(block=64),
  "longformer": dict(window=512),
}
MEMORIES = {  # rows as segments, one after the other: cached_tx.memory
  "xl": dict(kind="xl", size=128),
  "compressive": dict(
    kind="compressive", size=64, compressed=64, compressor="mean", loss="none"
  ),
}
MODELS = (
  "transformer", "local", "sparse", "longformer", "linformer", "reformer", "sinkhorn",
  "synthesizer", "bigbird", "linear", "performer", *MEMORIES,
)  # fmt: skip


def get_config(mode="transformer"):
  model, *words = mode.split(",")
  if model not in MODELS or set(words) - {"cached", "smoke"}:
    raise ValueError(
      f"unknown mode {mode!r}: one of {', '.join(MODELS)}, then cached, smoke"
    )
  c = ConfigDict()
  c.seed = 0
  c.steps = 20000
  c.batch = 32
  c.log_every = 50
  c.task = ConfigDict(dict(name="text", path="data/lra", length=1000))
  c.model = ConfigDict(
    dict(
      attention=model,
      layers=4,
      width=256,
      qkv=256,
      mlp=1024,
      heads=4,
      pool="cls",
      positions="sinusoidal",
      interaction="nli",
      dropout=0.1,
      attention_dropout=0.1,
      dtype="float32",
    )
  )
  if model in ("linear", "performer"):
    c.model.attention_dropout = 0.0  # they have no weights that could be dropped
  c.attention = ConfigDict(ATTENTION.get(model, {}))
  if model in MEMORIES:
    c.model.update(dict(attention="recurrent", pool="mean", qkv=c.model.width))
    c.attention = ConfigDict(dict(segment=128, memory=MEMORIES[model]))
  c.memory = ConfigDict(dict(kind="none"))
  c.optimizer = ConfigDict(
    dict(
      rate=0.05,
      schedule="rsqrt",
      warmup=8000,
      decay=0.1,
      b1=0.9,
      b2=0.98,
      epsilon=1e-9,
      clip=0.0,
      accumulate=1,
    )
  )
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
  c.eval = ConfigDict(dict(every=500, batch=32, examples=0))
  c.save = ConfigDict(dict(every=500, keep=1))
  if "cached" in words:
    c.memory = ConfigDict(dict(kind="grc", cache="shared", size=0, ratio=0.5))
  if "smoke" in words:
    c.steps, c.batch, c.task.length = 4, 4, 64
    c.model.update(dict(layers=1, width=16, qkv=16, mlp=16, heads=2))
    c.eval.update(dict(every=2, batch=4, examples=8))
    c.save.every, c.log_every = 2, 1
  return c  # open, for options of attentions that are not listed here
