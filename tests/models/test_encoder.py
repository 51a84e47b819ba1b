"""Encoders that classify: padding, pairs, caches, and the sizes that were published."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.lra.experiment import LraExperiment
from cached_tx.memory import GRCMemory
from cached_tx.models.encoder import EncoderClassifier, sinusoids
from cached_tx.types import Segment
from tests.kinds import some

FOLDER = Path(__file__).parents[2] / "configs" / "lra"
TOY = {"vocab": 11, "classes": 3, "max_len": 9, "layers": 2, "width": 16, "heads": 2}
OPTIONS = {
  "local": {"block": 4},
  "sparse": {"block": 4, "summary": 1},
  "longformer": {"window": 5},
  "sinkhorn": {"block": 4},
  "bigbird": {"block": 2, "random": 1},
  "reformer": {"chunk": 4},
  "performer": {"features": 8},
}


def toy(name="transformer", **more):
  return EncoderClassifier(
    **TOY | {"mlp": 8, "attention": name, "options": OPTIONS.get(name)} | more
  )


def inputs(model, rows=3, lengths=(9, 6, 1), seed=0):
  rng = np.random.default_rng(seed)
  shape = rows, model.inputs, model.max_len
  mask = np.arange(model.max_len) < np.array(lengths)[:, None, None]
  mask = np.broadcast_to(mask, shape)
  return jnp.asarray(rng.integers(1, 11, shape), jnp.int32), jnp.asarray(mask)


def params_of(model):
  tokens, mask = inputs(model)
  make = lambda: model.init(jax.random.key(0), tokens, mask, model.initial_state())
  made = jax.jit(make)()["params"]
  return jax.tree.map(
    lambda box: box.value if hasattr(box, "value") else box,
    made,
    is_leaf=lambda x: hasattr(x, "value"),
  )


# Worst error measured, of logits up to 2: 6e-7.
@pytest.mark.parametrize(
  "name", some(ATTENTIONS, ("transformer", "sparse", "bigbird", "performer"))
)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_padding_is_not_there(name, pool):
  """Whatever ids it has, a row is what it is alone and without it."""
  model = toy(name, pool=pool)
  params = params_of(model)
  tokens, mask = inputs(model)
  run = jax.jit(lambda tokens, mask: model.apply({"params": params}, tokens, mask, ()))
  got, _ = run(tokens, mask)
  other, _ = run(jnp.where(mask, tokens, 7), mask)
  np.testing.assert_array_equal(other, got)
  alone, _ = run(tokens[1:2, :, :6], mask[1:2, :, :6])
  np.testing.assert_allclose(alone[0], got[1], rtol=0, atol=3e-6)


def test_an_id_of_zero_is_a_token():
  """Black pixels: only the mask says what is padding."""
  model = toy()
  params = params_of(model)
  tokens, mask = inputs(model)
  run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, mask, ())[0])
  assert np.abs(run(tokens.at[:, :, 0].set(0)) - run(tokens)).max() > 1e-3


@pytest.mark.parametrize("interaction", ["concat", "nli"])
def test_pairs_are_encoded_by_the_same_parameters(interaction):
  model = toy(inputs=2, interaction=interaction)
  params = params_of(model)
  tokens, mask = inputs(model)
  run = jax.jit(lambda t, m: model.apply({"params": params}, t, m, ())[0])
  got = run(tokens, mask)
  assert np.abs(run(tokens[:, ::-1], mask[:, ::-1]) - got).max() > 1e-3
  width = {"concat": 32, "nli": 64}[interaction]
  assert params["head"]["kernel"].shape == (width, 8)


@pytest.mark.parametrize("name", some(ATTENTIONS, ("transformer", "bigbird")))
def test_caches(name):
  """Training fills them, evaluation reads them and the rows do not meet."""
  model = toy(name, memory=GRCMemory(0, 0.5, cache="shared"))
  assert model.initial_state()[0].cache.shape == (1, 10, 8)  # a slot for each token
  params = params_of(model)
  tokens, mask = inputs(model)
  apply = lambda state, **options: model.apply(
    {"params": params}, tokens, mask, state, **options
  )
  rngs = {"dropout": jax.random.key(1)}
  train = jax.jit(lambda state: apply(state, deterministic=False, rngs=rngs))
  logits, state = train(model.initial_state())
  assert all(own.filled.all() and np.abs(own.cache).max() > 0 for own in state)
  read = jax.jit(
    lambda tokens, mask, state: model.apply({"params": params}, tokens, mask, state)
  )
  logits, after = read(tokens, mask, state)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  empty, _ = read(tokens, mask, model.initial_state())
  assert np.abs(logits - empty).max() > 1e-4
  changed, _ = read(tokens.at[0].add(1) % 11, mask, state)
  np.testing.assert_array_equal(changed[1:], logits[1:])
  assert len(model.gauges(params)) == 4


def test_a_cached_branch_is_dropped_once():
  """The block drops what an attention adds, with a cache or without."""
  sizes = {"layers": 1, "attention_dropout": 0.5}
  model = toy("transformer", memory=GRCMemory(0, 0.5, cache="shared"), **sizes)
  (layer,) = model.attentions()
  x = jax.random.normal(jax.random.key(0), (3, 10, 16))
  segment, state = Segment(jnp.zeros((3, 10), bool)), model.initial_state()[0]
  params = jax.jit(layer.init)(jax.random.key(1), x, state, segment)
  rngs = {"dropout": jax.random.key(2)}
  y, _, _ = jax.jit(
    lambda x: layer.apply(params, x, state, segment, deterministic=False, rngs=rngs)
  )(x)
  assert np.all(y != 0)


def test_a_first_token_that_sees_nothing_is_refused():
  """Causal attention without a prefix, under a class token."""
  options = {"block": 4, "summary": 1, "prefix": 0}
  for memory in (None, GRCMemory(0, 0.5, cache="shared")):
    with pytest.raises(ValueError, match="the first token"):
      toy("sparse", options=options, memory=memory).check()
    toy("sparse", options=options, memory=memory, pool="mean").check()
  mean, first = (toy("sparse", pool=pool).attentions()[0] for pool in ("mean", "cls"))
  assert (mean.prefix, first.prefix) == (0, 1)


def test_every_parameter_learns():
  model = toy("transformer", memory=GRCMemory(0, 0.5, cache="shared"))
  params = params_of(model)
  tokens, mask = inputs(model)

  def loss(params):
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    state = model.initial_state()
    _, state = model.apply({"params": params}, tokens, mask, state, **options)
    logits, _ = model.apply({"params": params}, tokens, mask, state, **options)
    return (logits**2).sum()

  slopes = jax.jit(jax.grad(loss))(params)
  for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
    assert np.abs(slope).max() > 0, path


def test_many_layers_draw_their_rows():
  """In one program, their factorisations waited for one another for ever."""
  model = toy("performer", layers=6, options={"features": 64})
  tokens, mask = inputs(model)
  params = params_of(model)
  logits, _ = jax.jit(model.apply)({"params": params}, tokens, mask, ())
  assert np.isfinite(logits).all()
  rows = [np.asarray(layer.draw()) for layer in model.attentions()]
  assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(rows, 2))


def test_positions():
  table = sinusoids(50, 6)
  np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-6)
  np.testing.assert_allclose(table[7, 3], np.cos(7 / 10_000 ** (2 / 6)), atol=1e-6)
  model = toy(positions="learned")
  assert params_of(model)["positions"].shape == (10, 16)


WRONG = [
  ({"attention": "dense"}, "model.attention is 'dense'"),
  ({"pool": "sum"}, "model.pool is 'sum'"),
  ({"heads": 3}, "model.heads is 3"),
  ({"qkv": 7}, "of model.qkv"),
  ({"options": {"block": 3}}, "attention.block is no option of transformer"),
  ({"inputs": 3}, "an example has 3 rows"),
  ({"dropout": 1.0}, "model.dropout is 1.0"),
  ({"layers": 0}, "model.layers is 0"),
]


@pytest.mark.parametrize("fault,text", WRONG)
def test_wrong_settings_are_named(fault, text):
  with pytest.raises(ValueError, match=text):
    toy(**fault).check()


def test_rows_that_are_too_long_are_refused():
  model = toy()
  tokens = jnp.zeros((1, 1, 10), jnp.int32)
  with pytest.raises(ValueError, match=r"change task\.length"):
    jax.eval_shape(model.init, jax.random.key(0), tokens, tokens > 0, ())


def config(task, mode):
  spec = importlib.util.spec_from_file_location(task, FOLDER / f"{task}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(mode)


PARAMETERS = {
  ("listops", "transformer"): 8_948_746,
  ("listops", "performer"): 8_948_746,
  ("listops", "bigbird"): 8_948_746,
  ("listops", "synthesizer"): 137_076_778,
  ("listops", "longformer"): 12_094_474,
  ("listops", "linformer"): 9_076_810,
  ("text", "transformer"): 3_486_722,
  ("retrieval", "transformer"): 1_087_618,
  ("image", "transformer"): 248_458,
  ("pathfinder32", "transformer"): 26_530,
  ("pathfinder128", "transformer"): 537_954,
}


@pytest.mark.parametrize("task,model", PARAMETERS)
def test_sizes_are_the_published_ones(task, model):
  experiment = LraExperiment(config(task, model))
  made = jax.eval_shape(lambda: experiment.init_params(jax.random.key(0)))
  count = sum(x.size for x in jax.tree.leaves(made))
  assert count == PARAMETERS[task, model]


MEMORIES = ("xl", "compressive")
TASKS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("task", TASKS)
def test_every_model_of_a_config_can_be_built(task):
  for name in (*(name for name in ATTENTIONS if name != "recurrent"), *MEMORIES):
    for words in ("", ",cached"):
      LraExperiment(config(task, name + words)).model.check()
  with pytest.raises(ValueError, match="unknown mode"):
    config(task, "transformers")
