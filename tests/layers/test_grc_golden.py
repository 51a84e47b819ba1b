"""The gated encoder layer beside numbers from the authors' own code."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.layers import GatedEncoderAttention
from cached_tx.memory import GRCMemory, GRCState
from cached_tx.types import Segment
from tests.kinds import assert_close, jit, precision, some

GOLDEN = Path(__file__).parents[1] / "golden" / "grc"
TOLERANCE = {"float64": 1e-10, "float32": 5e-6}

# Errors are relative to each array's largest number.
CASES = [
  "a_plain_cls1_f64",
  "a_plain_cls1_f32",
  "a3_ratio1_f64",
  "b_plain_nopos_f64",
  "c_cache7_T17_f64",
  "c_cache7_T17_f32",
  "c2_cache29_T17_f64",
]


def read(name):
  """The arrays of a case, and what it is."""
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    arrays = {key: file[key] for key in file.files}
  return arrays, json.loads(str(arrays.pop("meta")))


def below(arrays, prefix):
  """Those under `prefix`, by the rest of their names."""
  return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def layer_of(meta, slots, dtype):
  """The layer with the authors' choices."""
  memory = GRCMemory(
    slots,
    meta["cache_ratio"],
    cache="shared",
    summary="attention",
    attend="updated",
    eval_update=True,
    candidate="gelu",
    lambda_start=-1.0,
    dtype=dtype,
  )
  return GatedEncoderAttention(
    width=meta["dim"],
    heads=meta["num_heads"],
    memory=memory,
    projection="branches",
    bias=meta["qkv_bias"],
    grid=(meta["H"], meta["W"]) if meta["spatial_pos_emb"] else None,
    prefix=meta["cls_dim"],
    dtype=dtype,
  )


def parameters(torch, heads):
  """The layer's parameters, from the authors' by name: transposed, reordered, split."""

  def to_heads(name, part=None):
    weight, bias = torch[f"{name}.weight"].T, torch.get(f"{name}.bias")
    if part is not None:  # keys and values lie in one matrix
      weight = jnp.split(weight, 2, axis=1)[part]
      bias = None if bias is None else jnp.split(bias, 2)[part]
    found = {"kernel": weight.reshape(len(weight), heads, -1)}
    return found if bias is None else found | {"bias": bias.reshape(heads, -1)}

  def from_heads(name):
    weight = torch[f"{name}.weight"].T
    kernel = weight.reshape(heads, -1, weight.shape[1])
    return {"kernel": kernel, "bias": torch[f"{name}.bias"]}

  def gate(name):  # theirs reads [cache, new], ours [new, cache]
    cache, new = jnp.split(torch[f"{name}.weight"].T, 2)
    return {"kernel": jnp.concatenate([new, cache]), "bias": torch[f"{name}.bias"]}

  params = {
    "gate": torch["lam"],
    "own": {
      "query": to_heads("attn_self_func.q"),
      "key": to_heads("attn_self_func.kv", 0),
      "value": to_heads("attn_self_func.kv", 1),
    },
    "output": from_heads("attn_self_func.proj"),
    "memory_query": to_heads("attn_mem.q"),
    "memory_key": to_heads("attn_mem.kv", 0),
    "memory_value": to_heads("attn_mem.kv", 1),
    "memory_output": from_heads("attn_mem.proj"),
    "memory": {
      "reset": gate("linear_reset"),
      "update": gate("linear_update"),
      "candidate": gate("linear_add"),
      "candidate_norm": {"scale": torch["Norm1.weight"], "bias": torch["Norm1.bias"]},
    },
  }
  if "pos_emb.weight" in torch:
    kernel = torch["pos_emb.weight"].transpose(2, 3, 1, 0)
    params["convolution"] = {"kernel": kernel, "bias": torch["pos_emb.bias"]}
  return params


def runner(layer, training):
  """(weights, x, state, r) -> outputs, state, gradients of sum(y r)."""

  def total(weights, x, state, r):
    y, state, losses = layer.apply(
      {"params": parameters(weights, layer.heads)},
      x,
      state,
      Segment(jnp.zeros(x.shape[:2], bool)),
      training=training,
    )
    assert not losses
    return (y * r).sum(), (y, state)

  def run(*args):
    grads, (y, state) = jax.grad(total, argnums=(0, 1), has_aux=True)(*args)
    return y, state, grads

  return jit(run)


QUICKLY = ("a_plain_cls1_f64", "c_cache7_T17_f32")
# The authors' float32 is that far from their own float64 here: sums that nearly cancel.
ROUNDED = {
  ("c_cache7_T17_f32", "grad_eval/w/attn_mem.q.bias"): 4e-5,
  ("c_cache7_T17_f32", "grad_eval/w/attn_mem.q.weight"): 4e-5,
}


@pytest.mark.parametrize("name", some(CASES, QUICKLY))
def test_the_authors_layer(name):
  golden, meta = read(name)
  tolerance = TOLERANCE[golden["x_eval"].dtype.name]
  wide = {k: np.float64(v) if v.dtype.kind == "f" else v for k, v in golden.items()}

  def close(got, key):
    assert_close(got, wide[key], ROUNDED.get((name, key), tolerance))

  with precision("float64"):
    check(wide, meta, close)


def check(golden, meta, close):
  layer = layer_of(meta, golden["cache/0"].shape[1], "float64")
  weights, start = below(golden, "w/"), layer.initial_state()
  if "cache/init" in golden:
    start = GRCState(jnp.asarray(golden["cache/init"]), jnp.array([True]))
  train, evaluate = runner(layer, True), runner(layer, False)

  def close_slopes(grads, key):
    of_weights, of_x = grads
    close(of_x, f"{key}/x")
    assert of_weights.keys() == below(golden, f"{key}/w/").keys()
    for name, slope in of_weights.items():
      close(slope, f"{key}/w/{name}")

  r = golden["grad_eval/r"]
  y, state, _ = evaluate(weights, golden["x_eval"], start, r)
  close(y, "y_eval_fresh")
  jax.tree.map(np.testing.assert_array_equal, state, start)
  step, state = 0, start
  while f"x/{step}" in golden:
    r = golden["grad/r"]
    y, state, grads = train(weights, golden[f"x/{step}"], state, r)
    close(y, f"y/{step}")
    close(state.cache, f"cache/{step}")
    if step == golden["grad/step"]:
      close_slopes(grads, "grad")
    step += 1
  assert step == 4
  r = golden["grad_eval/r"]
  y, after, grads = evaluate(weights, golden["x_eval"], state, r)
  close(y, "y_eval")
  close_slopes(grads, "grad_eval")
  jax.tree.map(np.testing.assert_array_equal, after, state)
