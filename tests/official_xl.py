"""Files made by Transformer-XL's own code: their arrays, its models as ours."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cached_tx.convert import from_official_xl, model_from_official
from cached_tx.models import DecoderLM
from tests import outside
from tests.outside import Arrays

FOLDER = outside.FOLDER / "xl"


def load(name: str, folder: Path = FOLDER) -> tuple[dict[str, Any], Arrays]:
  """What a file says of itself, and its arrays, floats in float64."""
  meta, arrays = outside.golden(name, folder)
  return meta, arrays.wide()


def rows(a: np.ndarray) -> np.ndarray:
  """Time-major, as the files are, to rows."""
  return np.swapaxes(a, 0, 1)


def worst(got: Any, want: np.ndarray) -> float:
  """The largest error, relative to the largest number that is wanted."""
  got = np.asarray(got)
  assert got.shape == want.shape, (got.shape, want.shape)
  if not want.size:
    return 0.0
  error = float(np.abs(got - want).max() / np.abs(want).max())
  assert math.isfinite(error)  # the max() of errors would pass over a NaN
  return error


def worst_of(got: Any, want: Any) -> float:
  """The largest of the errors of two trees of the same structure."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  return max(map(worst, jax.tree.leaves(got), jax.tree.leaves(want)))


def torch_model(meta: dict) -> DecoderLM:
  """The PyTorch code's language model, with the sizes and switches of a run."""
  config = meta["config"] | (meta["eval_switch"] or {})
  config["tgt_len"] = meta["seg_lens"][0]
  return model_from_official(config, dtype="float64")


def tf_model(meta: dict) -> DecoderLM:
  """The same of the TensorFlow code."""
  config = meta["config"] | {"mem_len": meta["mem_len"], "tgt_len": meta["T"]}
  return model_from_official(config, tensorflow=True, dtype="float64")


def parameters(arrays: Arrays, prefix: str, model: DecoderLM) -> dict[str, Any]:
  """Its parameters, or gradients by them: the arrays whose names begin so."""
  return from_official_xl(arrays.below(prefix), model)
