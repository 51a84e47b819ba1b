"""Files made by Transformer-XL's own code: their arrays, its models as ours."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cached_tx.convert import from_official_xl, model_from_official
from cached_tx.models import DecoderLM

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


def torch_model(meta: dict) -> DecoderLM:
  """The PyTorch code's language model, with the sizes and switches of a run."""
  config = meta["config"] | (meta["eval_switch"] or {})
  config["tgt_len"] = meta["seg_lens"][0]
  return model_from_official(config, dtype="float64")


def tf_model(meta: dict) -> DecoderLM:
  """The same of the TensorFlow code."""
  config = meta["config"] | {"mem_len": meta["mem_len"], "tgt_len": meta["T"]}
  return model_from_official(config, tensorflow=True, dtype="float64")


def parameters(arrays: Any, prefix: str, model: DecoderLM) -> dict[str, Any]:
  """Its parameters, or gradients by them: the arrays whose names begin so."""
  own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
  return from_official_xl(own, model)
