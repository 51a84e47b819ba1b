"""Transformers that remember more than they attend to, in JAX and Flax.

`cached_tx.load(folder)` reads a trained model back. Everything else is imported
from its own module (`cached_tx.memory`, `cached_tx.models`, ...), so that importing
the package, and with it `cached-tx --help`, does not import JAX.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
  """Imports `load` when it is first used."""
  if name != "load":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  function = import_module("cached_tx.load").load
  globals()[name] = function  # importing the submodule bound its own name here
  return function
