"""Arrays by name, read from files that hold nothing else, and each used once."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

Weights = Mapping[str, np.ndarray]


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays of a .safetensors or .npz file, by name.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another kind of file, a damaged one, or an array of Python objects.
  """
  path = Path(path)
  readers = {".safetensors": _safetensors, ".npz": _npz}
  if path.suffix in readers:
    try:
      return readers[path.suffix](path)
    except OSError:
      raise
    except Exception as error:  # the formats' own errors have no common class
      raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error
  raise ValueError(
    f"{path} is neither .safetensors nor .npz. A pickle (.pt, .bin) can run code and "
    "is not read: python -m pydoc cached_tx.convert says how to write a .safetensors"
  )


def _safetensors(path: Path) -> dict[str, np.ndarray]:
  import safetensors.numpy

  return safetensors.numpy.load_file(path)


def _npz(path: Path) -> dict[str, np.ndarray]:
  with path.open("rb") as file:
    found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
      raise ValueError("it holds one array without a name")
    return {name: found[name] for name in found.files}


class Taken:
  """Weights, each of which is taken once; what does not fit is told at the end."""

  def __init__(self, weights: Weights):
    self._left = dict(weights)
    self._wrong: list[str] = []

  def __contains__(self, name: str) -> bool:
    return name in self._left

  def length(self, name: str) -> int:
    """Of an array that is not taken by this; 0 where there is none, or one number."""
    return sum(np.shape(self._left.get(name, ()))[:1])

  def __call__(self, name: str, *shape: int) -> np.ndarray:
    """The array of this name and shape, in float32, or in float64 if it is."""
    if name not in self._left:
      self._wrong.append(f"{name} is missing")
      return np.zeros(shape, np.float32)
    found = self._left.pop(name)
    if found.shape != shape or not jnp.issubdtype(found.dtype, jnp.floating):
      self._wrong.append(
        f"{name} is {found.dtype} {found.shape}, but the model has floats {shape}"
      )
      return np.zeros(shape, np.float32)
    return found if found.dtype == np.float64 else found.astype(np.float32)

  def copy(self, name: str, original: np.ndarray, tolerance: float = 0.0) -> None:
    """Takes what must equal `original`, if it is there."""
    if name in self:
      found = self(name, *original.shape)
      if not np.allclose(found, original, rtol=tolerance, atol=0):
        self._wrong.append(f"{name} differs from what the model has in its place")

  def finish(self) -> None:
    """Raises ValueError, with a list, if anything was wrong or is left."""
    problems = [*self._wrong, *(f"{name} is unknown" for name in self._left)]
    if problems:
      lines = "".join(f"\n  {problem}" for problem in problems)
      raise ValueError(f"the weights are not those of this model:{lines}")
