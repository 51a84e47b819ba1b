"""A memory of the library as the attention of a classifier: the memory itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers import attention_for
from cached_tx.layers.attentions import RecurrentAttention
from cached_tx.memory import build_memory
from cached_tx.models.encoder import EncoderClassifier
from cached_tx.types import Segment
from tests.kinds import precision

D, H, C = 8, 2, 4
MEMORIES = {
  "none": {},
  "xl": {"size": 6},
  "compressive": {
    "size": 4, "compressed": 3, "rate": 2, "compressor": "mean", "loss": "none",
  },
  "grc": {"size": 5},
  "favor": {"features": 16},
}  # fmt: skip


def made(kind, **options):
  memory = {"kind": kind} | MEMORIES[kind]
  return RecurrentAttention(H, D // H, memory, C, **options)


@pytest.mark.parametrize("kind", MEMORIES)
def test_heads_are_those_of_the_stream(kind):
  """Rows of several lengths with holes: token by token, padding left out."""
  rng = np.random.default_rng(0)
  valid = rng.random((3, 19)) < np.array([[1.0], [0.7], [0.4]])
  with precision("float64"):
    layer = made(kind, dtype="float64")
    x = jnp.asarray(np.where(valid[..., None], rng.normal(size=(3, 19, D)), 0))
    segment = Segment(jnp.zeros(valid.shape, bool), jnp.asarray(valid))
    params = jax.jit(layer.init)(jax.random.key(0), x, segment)
    got = np.asarray(jax.jit(layer.apply)(params, x, segment))
    wide = {"dtype": "float64"} if kind in ("compressive", "grc") else {}
    own = attention_for(
      build_memory(kind, **MEMORIES[kind], **wide),
      width=D, heads=H, segment=C, positions="rotary", dtype="float64",
    )  # fmt: skip
    for row in range(3):
      real = x[row : row + 1, valid[row]]
      state = own.open_stream(own.initial_state(1), 1)
      whole = Segment(jnp.zeros(real.shape[:2], bool))
      mix = lambda layer, x, state, whole=whole: layer.mix(
        x, state, whole, layer.draw(0), True
      )[0]
      read = {"params": params["params"]["read"]}
      run = jax.jit(
        lambda x, state, read=read, mix=mix: own.apply(read, x, state, method=mix)
      )
      want = run(real, state)
      np.testing.assert_allclose(got[row, valid[row]], want[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["xl", "favor"])
def test_layers_have_rows_and_parameters_of_their_own(kind):
  model = classifier({"kind": kind} | MEMORIES[kind])
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 9, (2, 1, 19)))
  mask = jnp.ones(tokens.shape, bool)
  params = jax.jit(model.init)(jax.random.key(0), tokens, mask, ())

  def loss(params):
    logits, _ = model.apply(
      params, tokens, mask, (), deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    return (logits**2).sum()

  slopes = jax.jit(jax.grad(loss))(params)
  for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0, path
  if kind == "favor":
    rows = [own._layer(parent=None).draw(own.layer).rows for own in model.attentions()]
    assert np.abs(rows[0] - rows[1]).max() > 0.1


def classifier(memory=None, **options):
  given = {"segment": C} | ({} if memory is None else {"memory": memory})
  settings = {"pool": "mean", "qkv": 0} | options
  return EncoderClassifier(
    vocab=9, classes=3, max_len=19, layers=2, width=D, heads=H, mlp=8,
    attention="recurrent", options=given, **settings,
  )  # fmt: skip


def test_a_row_reaches_as_far_back_as_its_memory():
  """The first token is seen by the last, through segments; without a memory not."""
  x = np.random.default_rng(0).normal(size=(1, 19, D)).astype(np.float32)
  other = x.copy()
  other[0, 0] += 1
  segment = Segment(jnp.zeros((1, 19), bool))
  for kind, reaches in (("grc", True), ("favor", True), ("none", False)):
    layer = made(kind)
    params = jax.jit(layer.init)(jax.random.key(0), x, segment)
    run = jax.jit(lambda x, layer=layer, params=params: layer.apply(params, x, segment))
    assert (np.abs(run(x) - run(other))[0, -1].max() > 1e-6) == reaches


WRONG = [
  ({"pool": "cls"}, None, "model.pool is 'cls', the first token"),
  ({}, {"size": 3}, "attention.memory has no kind"),
  ({}, {"kind": "lstm"}, "attention.memory.kind is 'lstm'"),
  ({}, {"kind": "xl", "slots": 3}, "attention.memory.slots is 3"),
  ({}, {"kind": "compressive"}, "set attention.memory.loss to none"),
  ({}, {"kind": "favor", "redraw": 2}, "attention.memory.redraw is 2"),
  ({"attention_dropout": 0.1}, {"kind": "favor"}, "running sums have no weights"),
]


@pytest.mark.parametrize("options,memory,text", WRONG)
def test_wrong_settings_are_named(options, memory, text):
  with pytest.raises(ValueError, match=text):
    classifier(memory, **options).check()


def test_other_channels_than_the_model_s_are_refused():
  model = classifier(qkv=4)
  tokens = jnp.ones((1, 1, 19), jnp.int32)
  with pytest.raises(ValueError, match=r"set model\.qkv to model\.width"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), tokens, tokens.astype(bool), ())
    )
