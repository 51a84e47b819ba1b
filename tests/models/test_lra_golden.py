"""The classifier beside logits and gradients of the benchmark's own code.

Weights are mapped here; the files are described in tests/golden/README.md. Published
code that does not mask padding is asked as what it computes: every token is real.
"""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cached_tx.layers.attentions import performer
from cached_tx.layers.favor import FavorEncoderAttention
from cached_tx.models.encoder import EncoderClassifier

GOLDEN = Path(__file__).parents[1] / "golden" / "lra"


class Case(NamedTuple):
  """How a file is asked.

  Attributes:
    attention: by name.
    options: of it.
    model: other settings.
    masked: whether the published code masks padding.
    logits: largest error allowed, of the largest logit.
    gradients: largest error allowed, of the largest number of a gradient.
  """

  attention: str
  options: dict[str, Any] = {}  # noqa: RUF012
  model: dict[str, Any] = {}  # noqa: RUF012
  masked: bool = True
  logits: float = 1e-5
  gradients: float = 1e-4


RELU = {"kernel": "relu", "projection": "none"}  # what its performer computes
CASES = {
  "transformer_cls": Case("transformer"),
  "transformer_dual": Case("transformer", model={"inputs": 2, "pool": "first"}),
  "longformer": Case("longformer", {"window": 9, "global_tokens": 0}),
  "linear_transformer": Case("linear", masked=False),
  "linformer": Case("linformer", {"rank": 16}, masked=False),
  "performer_relu_default": Case("performer", RELU, masked=False),
  "performer_dual": Case(
    "performer", RELU, model={"inputs": 2, "pool": "first"}, masked=False
  ),
}
SIZES = {"max_len": 37, "layers": 2, "width": 16, "heads": 2, "mlp": 32, "qkv": 16}
PARTS = {
  "Embed_0": "embed",
  "encoder_norm": "norm",
  "LayerNorm_0": "attention_norm",
  "LayerNorm_2": "mlp_norm",
  "Dense_0": "up",
  "Dense_1": "down",
  "posembed_input": "",
  "pos_embedding": "positions",
  "mlp": "head",
  "mlp2": "head_2",
  "key_sliding_window": "key",
  "query_sliding_window": "query",
  "value_sliding_window": "value",
  "key_global": "global_key",
  "query_global": "global_query",
  "value_global": "global_value",
  "lr_kernel": "mixture",
}


def read(name: str) -> dict[str, np.ndarray]:
  """The arrays of a file."""
  with np.load(GOLDEN / f"lra_model_{name}.npz", allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def ours(path: str) -> tuple[str, ...]:
  """Where a parameter of the published code stands in the classifier."""
  found: list[str] = []
  for part in path.split("/")[1:]:
    if part == "encoder":
      continue
    if part.startswith("encoderblock_"):
      part = part.replace("encoderblock_", "block_")
    elif part.startswith("MlpBlock"):
      part = "mlp"
    elif part.endswith("Attention_1"):
      part = "attention"
    elif part == "out":
      found.pop()  # the output is the block's
      part = "output"
    else:
      part = PARTS.get(part, part)
    found += [part] if part else []
  return tuple(found)


def mapped(file: Any, prefix: str) -> dict[tuple[str, ...], np.ndarray]:
  """Parameters or gradients of a file by where they stand."""
  found = {}
  for name in file:
    if name.startswith(prefix + "/"):
      value = file[name]
      path = ours(name)
      value = value.reshape(-1) if path == ("cls",) else value
      found[path] = value[0] if path == ("positions",) else value
  return found


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    place = tree
    for part in path[:-1]:
      place = place.setdefault(part, {})
    place[path[-1]] = jnp.asarray(value)
  return tree


def flat(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(p.key for p in path): np.asarray(leaf) for path, leaf in leaves}


def asked(file: Any, case: Case, masked: bool):
  """The classifier of a file, its parameters, and its inputs."""
  classes = file["logits"].shape[-1]
  model = EncoderClassifier(
    vocab=20,
    classes=classes,
    attention=case.attention,
    options=case.options,
    interaction="concat",
    **SIZES | case.model,
  )
  names = ["inputs", "inputs2"][: model.inputs]
  tokens = np.stack([file[name] for name in names], axis=1).astype(np.int32)
  mask = tokens > 0 if masked else np.ones(tokens.shape, bool)
  return model, mapped(file, "params"), jnp.asarray(tokens), jnp.asarray(mask)


def near(got, want, rate, largest=None):
  """Whether the error is small beside the largest number, or beside `largest`."""
  largest = np.abs(want).max() if largest is None else largest
  return float(np.abs(np.asarray(got) - want).max() / largest) < rate


def compare(name: str, case: Case) -> None:
  """Logits, loss and all gradients of a file."""
  file = read(name)
  model, params, tokens, mask = asked(file, case, case.masked)
  params = {path: value * scale(path, case) for path, value in params.items()}

  def loss_fn(params):
    logits, _ = model.apply({"params": params}, tokens, mask, ())
    labels = jnp.asarray(file["labels"], jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean(), logits

  with jax.default_matmul_precision("highest"):
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), grads = run(nested(params))
  assert near(logits, file["logits"], case.logits)
  np.testing.assert_allclose(loss, file["loss"], rtol=case.logits)
  want, got = mapped(file, "grads"), flat(grads)
  assert want.keys() == got.keys()
  for path in want:
    largest = max(np.abs(want[path]).max(), 1e-3)
    assert near(got[path] * scale(path, case), want[path], case.gradients, largest)


def scale(path: tuple[str, ...], case: Case) -> float:
  """The published generalised kernel takes q and k as they are, ours over K^(1/4)."""
  plain = case.options.get("kernel") == "relu"
  own = plain and not {"query", "key"}.isdisjoint(path)
  return float((SIZES["qkv"] / SIZES["heads"]) ** 0.25) if own else 1.0


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name):
  compare(name, CASES[name])


def favor_as_published(q, k, v, rows, **_):
  """FAVOR+ with epsilons: 1e-6 added to every feature, padding counted."""
  products = lambda x: jnp.einsum("blhk,mk->blhm", x, rows)
  half = lambda x: (x**2).sum(axis=-1, keepdims=True) / 2
  a, b = products(q), products(k)
  a = jnp.exp(a - half(q) - a.max(axis=-1, keepdims=True)) + 1e-6
  b = jnp.exp(b - half(k) - b.max(axis=(1, 3), keepdims=True)) + 1e-6
  top = jnp.einsum("blhm,bshm,bshk->blhk", a, b, v)
  bottom = jnp.einsum("blhm,bshm->blh", a, b)
  return top / bottom[..., None]


SOFTMAX = (
  "performer_softmax_m12_noredraw",
  Case("performer", {"features": 12}, masked=False),
)


def rows_of_the_file() -> Any:
  """Its rows take the place of the drawn ones, in both layers."""
  rows = jnp.asarray(read(SOFTMAX[0])["projection_matrix"])
  return mock.patch.object(FavorEncoderAttention, "draw", lambda self: rows)


def compare_as_published(name: str, case: Case) -> None:
  """A file, with the published epsilons in the attention."""
  with (
    rows_of_the_file(),
    mock.patch.object(performer, "favor_bidirectional", favor_as_published),
  ):
    compare(name, case)


def test_performer_with_features_of_the_softmax():
  """The published epsilons, which the library has not, move the logits."""
  name, case = SOFTMAX
  file = read(name)
  with rows_of_the_file():
    model, params, tokens, mask = asked(file, case, case.masked)
    logits, _ = jax.jit(model.apply)({"params": nested(params)}, tokens, mask, ())
  gap = np.abs(logits - file["logits"]).max() / np.abs(file["logits"]).max()
  assert 1e-3 < gap < 1e-2  # measured: 3.2e-3
  compare_as_published(name, case)


def test_the_mean_is_over_real_tokens_alone():
  """The published code's is over padding too: rows without any are equal."""
  file = read("transformer_mean_learnpos")
  case = Case("transformer", model={"pool": "mean", "positions": "learned"})
  model, params, tokens, mask = asked(file, case, True)
  with jax.default_matmul_precision("highest"):
    logits, _ = jax.jit(model.apply)({"params": nested(params)}, tokens, mask, ())
  assert mask[0].all() and not mask[1].all()
  assert near(logits[0], file["logits"][0], 1e-5)
  short = int(mask[1].sum())
  cut = jax.jit(model.apply)
  with jax.default_matmul_precision("highest"):
    want, _ = cut(
      {"params": nested(params)}, tokens[1:, :, :short], mask[1:, :, :short], ()
    )
  assert near(logits[1:], want, 1e-5)
