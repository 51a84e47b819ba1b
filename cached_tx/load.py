"""A trained model, read back: for notebooks, and for the commands that need one."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32, Integer
from ml_collections import ConfigDict

from cached_tx.data import Tokenizer
from cached_tx.memory import load_state, save_state
from cached_tx.models import DecoderLM
from cached_tx.train.experiment import Experiment
from cached_tx.train.run_config import lasting
from cached_tx.train.sharding import one_device
from cached_tx.types import Segment, State


class Loaded(NamedTuple):
  """What a workdir holds.

  Attributes:
    model: without parameters; that `after` the steps: a memory that draws random rows
      anew has those which the parameters were trained with last.
    params: float32, on this process's first device (their moving average, where the
      config keeps one).
    state: of empty memories; takes any number of tokens a call, one after the other.
      `model.initial_state(batch)` is the one that takes whole segments at once.
    tokenizer: between text and ids.
    config: that the model was trained with.
    step: finished training steps.
  """

  model: DecoderLM
  params: Any
  state: State
  tokenizer: Tokenizer
  config: ConfigDict
  step: int

  def ids(self, text: bytes) -> Int32[np.ndarray, "1 L"]:
    """One row: the document that begins with `text`, BOS first."""
    return np.append(np.int32(self.tokenizer.bos), self.tokenizer.encode(text))[None]

  def __call__(self, ids: Integer[np.ndarray, "B L"], state: State) -> tuple:
    """Reads on. Compiled once for every shape.

    Args:
      ids: any number; a BOS among them begins a new document.
      state: `self.state`, one from `model.initial_state` (L is a multiple of the
        segment), or what a former call returned.

    Returns:
      Logits of the token after each (B L V, float32), and the state afterwards.
    """
    return _apply(self.model, self.params, ids, ids == self.tokenizer.bos, state)

  def save_state(
    self,
    path: str | os.PathLike,
    state: State,
    meta: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes a state to one file that only this model reads, with these weights.

    Arguments and errors as of `cached_tx.memory.save_state`.
    """
    bound = lasting(self.config.to_dict())
    save_state(path, state, params=self.params, config=bound, meta=meta)

  def load_state(
    self, path: str | os.PathLike, like: State | None = None
  ) -> tuple[State, dict[str, Any]]:
    """Reads a state that `save_state` wrote, and its `meta`.

    Args:
      path: of the file.
      like: of the same structure and rows; None: `self.state`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or of another model or number of rows.
    """
    bound = lasting(self.config.to_dict())
    like = self.state if like is None else like
    return load_state(path, like, params=self.params, config=bound)


@partial(jax.jit, static_argnums=0)
def _apply(model: DecoderLM, params: Any, ids: Any, starts: Any, state: State) -> tuple:
  return model.apply({"params": params}, ids, state, Segment(starts))[:2]


def load(workdir: str | os.PathLike, step: int | None = None, batch: int = 1) -> Loaded:
  """Reads a trained model on one device, whatever the mesh that trained it.

  In a notebook:

      import cached_tx
      own = cached_tx.load("runs/quickstart")
      logits, state = own(own.ids(b"In the beginning"), own.state)
      logits, state = own(own.tokenizer.encode(b" God created")[None], state)

  All memory is in `state`: the second call goes on where the first one ended, and so
  does one in another process, after `own.save_state(path, state)`, from
  `own.load_state(path)`.
  `cached_tx.generate.generate` samples.

  Args:
    workdir: of the training run.
    step: of the checkpoint; None for the newest valid one.
    batch: rows of `state`.

  Raises:
    FileNotFoundError: nothing was trained in `workdir`.
    ValueError: no such checkpoint, or none that is valid; batch below 1.
  """
  if batch < 1:
    raise ValueError(f"batch is {batch}; a state has 1 row or more")
  experiment = Experiment.of(workdir, mesh=one_device())
  params, step = experiment.restore_params(workdir, step)
  model = experiment.model.after(step)
  state = model.open_stream(model.initial_state(batch), batch)
  return Loaded(model, params, state, experiment.tokenizer, experiment.config, step)


class _Callable(ModuleType):
  """Makes `cached_tx.load(folder)` work even where the submodule has taken the name."""

  def __call__(self, *args: Any, **options: Any) -> Loaded:
    return load(*args, **options)


sys.modules[__name__].__class__ = _Callable
