"""What a config describes: the same for training, evaluation and generation."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cached_tx.data import Documents, Tokenizer, documents, make_tokenizer
from cached_tx.models import DecoderLM, build_model
from cached_tx.train import sharding
from cached_tx.train.checkpoint import Checkpoints
from cached_tx.train.config import check, from_json, overridden
from cached_tx.train.run_config import read_config
from cached_tx.train.state import init_params


class Experiment:
  """A config and what it stands for; each part is made when it is asked for.

  Attributes:
    config: checked.
  """

  def __init__(self, config: ConfigDict, mesh: Mesh | None = None):
    """Checks the config.

    Args:
      config: all of it.
      mesh: what to use instead of the config's mesh.

    Raises:
      ValueError: naming the key, for a config that cannot be run.
    """
    check(config.to_dict())
    self.config = config
    self._mesh = mesh

  @classmethod
  def of(
    cls,
    workdir: str | os.PathLike,
    *,
    changes: Sequence[str] = (),
    mesh: Mesh | None = None,
  ) -> "Experiment":
    """The experiment that was run in `workdir`.

    Args:
      workdir: of the training run.
      changes: to its config, each of the form memory.size=512.
      mesh: what to use instead of the config's mesh.

    Raises:
      FileNotFoundError: no config.json there.
      ValueError: a change that cannot be made.
    """
    stored = read_config(workdir)
    if stored is None:
      raise FileNotFoundError(
        f"{os.fspath(workdir)} has no config.json: train there first (--workdir)"
      )
    return cls(overridden(from_json(stored), list(changes)), mesh)

  def documents(self, split: str) -> Documents:
    """The documents of a split: train, validation or test."""
    return documents(self.config.data.name, split, self.config.data.path)

  @cached_property
  def tokenizer(self) -> Tokenizer:
    """Between text and ids."""
    name, vocab = self.config.data.tokenizer, self.config.data.vocab
    corpus = None if name == "bytes" or vocab else self.documents("train")
    return make_tokenizer(name, vocab, corpus)

  @cached_property
  def model(self) -> DecoderLM:
    """The network, without parameters."""
    return build_model(self.config, self.tokenizer.vocab)

  @cached_property
  def mesh(self) -> Mesh:
    """Devices, by axis."""
    if self._mesh is not None:
      return self._mesh
    return sharding.make_mesh(**self.config.mesh)

  def abstract_params(self) -> Any:
    """Shapes, dtypes and places of the parameters."""
    boxed = jax.eval_shape(lambda: init_params(self.model, jax.random.key(0)))
    shardings = sharding.parameter_shardings(boxed, self.mesh)
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      sharding.unboxed(boxed),
      shardings,
    )

  def restore_params(
    self, workdir: str | os.PathLike, step: int | None = None
  ) -> tuple[Any, int]:
    """The verified parameters of a checkpoint (their average, where one is kept).

    Args:
      workdir: of the training run.
      step: which; None for the newest valid one.

    Returns:
      The parameters, and the number of steps behind them.

    Raises:
      ValueError: no such checkpoint, or none that is valid; or the tokenizer is not
        the one that the model was trained with.
    """
    name = "ema" if self.config.optimizer.ema else "params"
    with Checkpoints(workdir, read_only=True) as checkpoints:
      params, meta = checkpoints.restore_params(self.abstract_params(), step, name)
    stored, given = meta.get("tokenizer"), self.tokenizer.identity
    if stored not in (None, given):
      raise ValueError(
        f"the ids of this run's model are those of {stored}, but data.tokenizer and "
        f"data.vocab now give {given}: restore the vocabulary that it was trained with"
      )
    return params, meta["step"]
