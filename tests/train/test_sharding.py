"""Where arrays lie, and that it changes no number."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from cached_tx.data import TrainStream, tokenize
from cached_tx.train import sharding
from cached_tx.train.experiment import Experiment
from cached_tx.train.feed import Feed
from cached_tx.train.loop import prepare
from tests.train import toy

MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
ROWS = 8


def mesh(*shape: int):
  return jax.make_mesh(
    shape,
    sharding.AXES,
    devices=jax.devices()[: int(np.prod(shape))],
    axis_types=(AxisType.Auto,) * len(shape),
  )


def config(kind: str, path: str = ""):
  c = toy.get_config(kind).unlock()
  c.batch, c.data.path = ROWS, path
  return c.lock()


def state_on(kind: str, *shape: int):
  """A state at step 0 and its experiment."""
  experiment = Experiment(config(kind), mesh(*shape))
  with jax.set_mesh(experiment.mesh), nn.logical_axis_rules(sharding.RULES):
    return prepare(experiment)[0]


def spec(array):
  """Of an array; without the Nones at its end."""
  parts = list(array.sharding.spec)
  while parts and parts[-1] is None:
    parts.pop()
  return PartitionSpec(*parts)


@pytest.mark.parametrize("shape", MESHES)
def test_arrays_are_born_where_the_rules_say(shape):
  state = state_on("compressive", *shape)
  named = jax.tree_util.tree_leaves_with_path(state.params)
  params = {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in named}
  sizes = dict(zip(sharding.AXES, shape, strict=True))

  def divided(array, dim):
    return array.shape[dim] // array.sharding.shard_shape(array.shape)[dim]

  embedding = params["embedding"]  # 257 rows: no mesh axis divides them
  assert (divided(embedding, 0), divided(embedding, 1)) == (1, sizes["fsdp"])
  kernels = [a for name, a in params.items() if "mlp" in name and "kernel" in name]
  assert len(kernels) >= 2
  for kernel in kernels:  # layers, and embed and mlp in either order
    parts = (divided(kernel, 0), {divided(kernel, 1), divided(kernel, 2)})
    assert parts == (1, {sizes["fsdp"], sizes["tensor"]})
  rows = sizes["data"] * sizes["fsdp"]
  for leaf in jax.tree.leaves(state.memory):
    assert (divided(leaf, 0), divided(leaf, 1)) == (1, rows)
    assert leaf.shape[1] == ROWS


@pytest.mark.parametrize("shape", MESHES[1:])
def test_the_optimiser_lies_where_the_parameters_lie(shape):
  state = state_on("compressive", *shape)
  places = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    places[jax.tree_util.keystr(path)] = leaf
  found = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    name = jax.tree_util.keystr(path)
    own = [p for end, p in places.items() if name.endswith(end)]
    if own and own[0].shape == leaf.shape:
      assert spec(leaf) == spec(own[0]), name
      found += 1
  assert found >= len(places)  # one moment of each at least
  assert jax.tree.map(spec, state.ema) == jax.tree.map(spec, state.params)


def three_steps(kind, path, *shape, seed=3):
  experiment = Experiment(config(kind, str(path)), mesh(*shape))
  own = experiment.config
  with jax.set_mesh(experiment.mesh), nn.logical_axis_rules(sharding.RULES):
    state, _, step = prepare(experiment)
    if seed != 3:
      state = state.replace(rng=jax.random.key(seed))
    length = own.segment * own.segments
    tokens = tokenize(experiment.documents("train"), experiment.tokenizer)
    stream = TrainStream(tokens, rows=ROWS, length=length, seed=0)
    feed = Feed(experiment.mesh, ROWS, length)
    losses = []
    for i in range(3):
      state, metrics = step(state, feed(stream.batch(i)))
      losses.append(float(metrics["loss"]))
  return losses, jax.device_get((state.params, state.memory))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  path = toy.write_text(tmp_path_factory.mktemp("data") / "text")
  return path, three_steps("compressive", path, 1, 1, 1, 1)


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_changes_no_number(shape, alone):
  path, (losses, want) = alone
  found, got = three_steps("compressive", path, *shape)
  np.testing.assert_allclose(found, losses, rtol=1e-6)
  for (name, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    scale = np.abs(np.float64(b)).max(initial=0) or 1.0
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=str(name))


def test_other_dropout_masks_would_show(alone):
  path, (losses, _) = alone
  other, _ = three_steps("compressive", path, 1, 1, 1, 1, seed=4)
  assert abs(other[0] - losses[0]) > 1e-4


@pytest.mark.parametrize(
  "sizes,message",
  [
    ((-1, -1, 1, 1), "at most once"),
    ((3, 1, 1, 1), "do not multiply to the 8 devices"),
    ((0, 1, 1, 1), "sizes are 1 or more"),
    ((-1, 3, 1, 1), "do not multiply"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes)


def test_minus_one_is_the_rest():
  assert dict(sharding.make_mesh(-1, 2, 2, 1).shape) == {
    "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1
  }  # fmt: skip
