"""The arena's configs beside the published hyperparameters, every one of them.

Of the published code's configs at commit cd31e5c; docs/lra.md says where and why a
config differs.
"""

import pytest

from tests.models.test_encoder import config

# Of every task: batch, steps, rate, warmup, schedule, decay, clip; width, qkv, mlp,
# heads, layers; dropout, of attention weights; pool, positions, length.
PUBLISHED = {
  "listops": (
    (32, 5_000, 0.05, 1000, "rsqrt", 0.1, 0.0),
    (512, 512, 1024, 8, 4),
    (0.1, 0.1),
    ("cls", "sinusoidal", 2000),
  ),
  "text": (
    (32, 20_000, 0.05, 8000, "rsqrt", 0.1, 0.0),
    (256, 256, 1024, 4, 4),
    (0.1, 0.1),
    ("cls", "sinusoidal", 1000),
  ),
  "retrieval": (
    (32, 5_000, 0.05, 8000, "rsqrt", 0.1, 0.0),
    (128, 128, 512, 4, 4),
    (0.1, 0.1),
    ("first", "sinusoidal", 4000),
  ),
  "image": (
    (256, 35_000, 5e-4, 175, "cosine", 0.0, 0.0),
    (128, 64, 128, 8, 1),
    (0.3, 0.2),
    ("cls", "learned", 1024),
  ),
  "pathfinder32": (
    (512, 62_400, 1e-3, 312, "cosine", 0.0, 0.0),
    (32, 16, 32, 4, 4),
    (0.2, 0.1),
    ("mean", "sinusoidal", 1024),
  ),
  "pathfinder128": (
    (64, 500_000, 1e-3, 2500, "cosine", 0.0, 1.0),
    (32, 16, 32, 2, 1),
    (0.1, 0.1),
    ("mean", "learned", 16384),
  ),
}
# What was published for one model alone: width, qkv, mlp, heads, layers, pool.
SAME = {
  "image": (128, 64, 128, 8, 1, "cls"),
  "pathfinder32": (32, 16, 32, 4, 4, "mean"),
}
DEVIATIONS = {
  ("image", "local"): (128, 64, 128, 2, 1, "mean"),
  ("image", "longformer"): (128, 64, 128, 4, 4, "mean"),
  ("image", "reformer"): (64, 32, 64, 8, 4, "cls"),
  ("image", "sinkhorn"): (128, 64, 128, 8, 1, "mean"),
  ("pathfinder32", "performer"): (128, 64, 128, 8, 1, "mean"),
  ("pathfinder32", "linear"): (128, 64, 128, 2, 1, "mean"),
  ("pathfinder32", "linformer"): (32, 16, 32, 2, 1, "mean"),
  ("pathfinder32", "local"): (64, 32, 64, 4, 2, "mean"),
  ("pathfinder32", "longformer"): (32, 16, 32, 2, 2, "mean"),
  ("pathfinder32", "sparse"): (32, 16, 32, 8, 1, "mean"),
  ("pathfinder32", "bigbird"): (64, 32, 64, 2, 4, "mean"),
  ("pathfinder32", "reformer"): (64, 32, 64, 8, 2, "mean"),
  ("pathfinder32", "sinkhorn"): (32, 16, 64, 4, 2, "mean"),
  ("pathfinder32", "synthesizer"): (64, 32, 64, 4, 2, "mean"),
}
MODELS = (
  "transformer", "local", "sparse", "longformer", "linformer", "reformer", "sinkhorn",
  "synthesizer", "bigbird", "linear", "performer",
)  # fmt: skip


def sizes(c):
  own = c.model
  return own.width, own.qkv, own.mlp, own.heads, own.layers


@pytest.mark.parametrize("task", PUBLISHED)
def test_settings_are_the_published_ones(task):
  c = config(task, "transformer")
  own = c.optimizer
  found = (
    (c.batch, c.steps, own.rate, own.warmup, own.schedule, own.decay, own.clip),
    sizes(c),
    (c.model.dropout, c.model.attention_dropout),
    (c.model.pool, c.model.positions, c.task.length),
  )
  assert found == PUBLISHED[task]
  assert (own.b1, own.b2, own.epsilon) == (0.9, 0.98, 1e-9)


@pytest.mark.parametrize("task", SAME)
@pytest.mark.parametrize("model", MODELS)
def test_settings_of_one_model_are_the_published_ones(task, model):
  c = config(task, model)
  want = DEVIATIONS.get((task, model), SAME[task])
  assert (*sizes(c), c.model.pool) == want


@pytest.mark.parametrize("task", PUBLISHED)
def test_blocks_are_the_published_ones(task):
  of = lambda model: config(task, model).attention.to_dict()
  image = task in ("image", "pathfinder32", "pathfinder128")
  assert of("sparse") == {"block": 50, "summary": 10}
  assert of("local") == of("sinkhorn") == {"block": 64 if image else 50}
  assert of("bigbird") == {"block": 64}


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_cache_has_a_slot_for_each_token_and_half_of_the_channels(task):
  memory = config(task, "bigbird,cached").memory.to_dict()
  assert memory == {"kind": "grc", "cache": "shared", "size": 0, "ratio": 0.5}
  if task == "listops":
    assert config(task, "bigbird,cached,deep").model.layers == 6
