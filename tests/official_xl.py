"""Files made by Transformer-XL's own code: their arrays, and its weights as ours."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(__file__).parent / "golden" / "xl"


def load(name: str, folder: Path = FOLDER) -> tuple[dict, dict[str, np.ndarray]]:
  """What a file says of itself, and its arrays, floats in float64."""
  with np.load(folder / f"{name}.npz", allow_pickle=False) as found:
    arrays = {key: found[key] for key in found.files}
  meta = json.loads(str(arrays.pop("meta_json")))
  wide = lambda a: np.float64(a) if a.dtype.kind == "f" else a
  return meta, {key: wide(a) for key, a in arrays.items()}


def rows(a: np.ndarray) -> np.ndarray:
  """Time-major, as the files are, to rows."""
  return np.swapaxes(a, 0, 1)


def worst(got: Any, want: np.ndarray) -> float:
  """The largest error, relative to the largest number that is wanted."""
  got = np.asarray(got)
  assert got.shape == want.shape, (got.shape, want.shape)
  if not want.size:
    return 0.0
  return float(np.abs(got - want).max() / np.abs(want).max())


def worst_of(got: Any, want: Any) -> float:
  """The largest of the errors of two trees of the same structure."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  return max(map(worst, jax.tree.leaves(got), jax.tree.leaves(want)))


def attention(qkv: Any, distance: Any, output: Any, heads: int) -> dict[str, Any]:
  """Projections of a layer, from kernels that lead with their inputs."""
  D = len(qkv)
  split = lambda kernel: {"kernel": kernel.reshape(D, heads, -1)}
  query, key, value = (split(kernel) for kernel in np.split(qkv, 3, axis=1))
  output = {"kernel": output.reshape(heads, -1, D)}
  distance = split(distance)
  return dict(query=query, key=key, value=value, distance=distance, output=output)


def torch_attention(arrays: Any, prefix: str, heads: int) -> dict[str, Any]:
  """Of one layer of the PyTorch code, or gradients by them; without u and v."""
  get = lambda name: arrays[f"{prefix}{name}_net.weight"].T
  return attention(get("qkv"), get("r"), get("o"), heads)


def torch_model(arrays: Any, prefix: str, config: dict) -> dict[str, Any]:
  """Parameters of the PyTorch code's language model, or gradients by them."""
  get = lambda name: arrays[prefix + name]
  norm = lambda name: dict(scale=get(f"{name}.weight"), bias=get(f"{name}.bias"))
  dense = lambda name: dict(kernel=get(f"{name}.weight").T, bias=get(f"{name}.bias"))
  blocks = []
  for i in range(config["n_layer"]):
    layer = f"layers.{i}."
    own = torch_attention(arrays, f"{prefix}{layer}dec_attn.", config["n_head"])
    ff = f"{layer}pos_ff."
    mlp = {"up": dense(ff + "CoreNet.0"), "down": dense(ff + "CoreNet.3")}
    block = {"attention": own, "mlp": mlp, "mlp_norm": norm(ff + "layer_norm")}
    place = own if config.get("pre_lnorm") else block
    name = "norm" if config.get("pre_lnorm") else "attention_norm"
    place[name] = norm(layer + "dec_attn.layer_norm")
    blocks.append(block)
  return {
    "embedding": get("word_emb.emb_layers.0.weight"),
    "output_bias": get("crit.out_layers.0.bias"),
    "content_bias": get("r_w_bias"),
    "distance_bias": get("r_r_bias"),
    **stacked(blocks),
  }


def tf_model(arrays: Any, config: dict) -> dict[str, Any]:
  """Parameters of the TensorFlow code's language model."""
  get = lambda name: arrays[f"param/transformer/{name}"]
  u, v = get("r_w_bias"), get("r_r_bias")
  blocks = []
  for i in range(config["n_layer"]):
    layer = f"layer_{i}/"

    def norm(name, layer=layer):
      name = f"{layer}{name}/LayerNorm/"
      return dict(scale=get(name + "gamma"), bias=get(name + "beta"))

    def dense(name, layer=layer):
      name = f"{layer}ff/{name}/"
      return dict(kernel=get(name + "kernel"), bias=get(name + "bias"))

    kernels = [get(f"{layer}rel_attn/{name}/kernel") for name in ("qkv", "r", "o")]
    own = attention(*kernels, config["n_head"])
    if config.get("untie_r"):
      own |= dict(content_bias=u[i], distance_bias=v[i])
    mlp = dict(up=dense("layer_1"), down=dense("layer_2"))
    norms = dict(attention_norm=norm("rel_attn"), mlp_norm=norm("ff"))
    blocks.append({"attention": own, "mlp": mlp, **norms})
  shared = {} if config.get("untie_r") else dict(content_bias=u, distance_bias=v)
  embedding = get("adaptive_embed/lookup_table")
  bias = get("adaptive_softmax/bias")
  return {"embedding": embedding, "output_bias": bias, **shared, **stacked(blocks)}


def stacked(blocks: list) -> dict[str, Any]:
  """The layers, scanned as periods of one block."""
  together = jax.tree.map(lambda *a: np.stack(a), *blocks)
  return {"stack": {"blocks_0": together}}
