"""What a config of the Long Range Arena describes."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cached_tx.data.lra import Examples, Task, examples, known
from cached_tx.lra.config import check
from cached_tx.lra.optimizer import make_optimizer
from cached_tx.memory import GRCMemory, NoMemory, build_memory
from cached_tx.models.encoder import EncoderClassifier
from cached_tx.options import typed
from cached_tx.train import processes, sharding
from cached_tx.train.checkpoint import Checkpoints
from cached_tx.train.config import from_json, overridden
from cached_tx.train.run_config import read_config
from cached_tx.train.state import TrainState


class Chosen(NamedTuple):
  """Which checkpoint of a run.

  Attributes:
    step: that it is of.
    by: validation (the smallest loss there), newest (none was scored) or step (named).
    newest: step of the newest checkpoint.
  """

  step: int
  by: str
  newest: int


class LraExperiment:
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
  ) -> "LraExperiment":
    """The experiment that was run in `workdir`; arguments as of `Experiment.of`."""
    stored = read_config(workdir)
    if stored is None or "task" not in stored:
      raise FileNotFoundError(
        f"{os.fspath(workdir)} holds no run of cached-tx lra train: train there first"
      )
    return cls(overridden(from_json(stored), list(changes)), mesh)

  @property
  def task(self) -> Task:
    """What is to be told apart."""
    return known(self.config.task.name)

  def examples(self, split: str) -> Examples:
    """The examples of a split: train, validation or test."""
    own = self.config.task
    return processes.first_then_others(lambda: examples(own.name, split, own.path))

  @cached_property
  def model(self) -> EncoderClassifier:
    """The network, without parameters."""
    options = dict(self.config.model)
    fields = EncoderClassifier.__dataclass_fields__
    options = typed("model.", options, {name: fields[name].type for name in options})
    task = self.task
    model = EncoderClassifier(
      vocab=task.vocab,
      classes=task.classes,
      max_len=self.config.task.length,
      inputs=task.inputs,
      options=self.config.attention.to_dict(),
      memory=self._memory(),
      seed=self.config.seed,
      **options,
    )
    model.check()
    return model

  def _memory(self) -> GRCMemory | None:
    memory = build_memory(**self.config.memory.to_dict())
    if isinstance(memory, NoMemory):
      return None
    if not isinstance(memory, GRCMemory) or memory.cache != "shared":
      raise ValueError(
        f"memory.kind is {self.config.memory.kind!r}; beside an encoder's attention "
        "there is none, or grc with memory.cache shared: rows have no earlier segments"
      )
    return memory.clone(dtype=self.config.model.dtype)

  @cached_property
  def mesh(self) -> Mesh:
    """Devices, by axis."""
    if self._mesh is not None:
      return self._mesh
    return sharding.make_mesh(**self.config.mesh)

  def init_params(self, key: jax.Array) -> Any:
    """Parameters, boxed with their logical axis names."""
    shape = (1, self.task.inputs, self.config.task.length)
    tokens, mask = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    return self.model.init(key, tokens, mask, self.model.initial_state())["params"]

  def prepare(self) -> tuple[TrainState, TrainState, Any]:
    """A state at step 0, its shardings, and the optimiser, on the mesh."""
    config, mesh = self.config, self.mesh
    optimizer = make_optimizer(steps=config.steps, **config.optimizer)

    def make() -> TrainState:
      key, rng = jax.random.split(jax.random.key(config.seed))
      params = sharding.unboxed(self.init_params(key))
      return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        memory=self.model.initial_state(),
        rng=rng,
      )

    boxed = jax.eval_shape(lambda: self.init_params(jax.random.key(0)))
    places = sharding.parameter_shardings(boxed, mesh)
    whole = sharding.replicated(mesh)
    abstract = jax.eval_shape(make)
    opt_state = sharding.like_parameters(
      abstract.opt_state, abstract.params, places, mesh
    )
    shardings = TrainState(
      step=whole,
      params=places,
      opt_state=opt_state,
      memory=jax.tree.map(lambda _: whole, abstract.memory),
      rng=whole,
    )
    return jax.jit(make, out_shardings=shardings)(), shardings, optimizer

  def restore(
    self, workdir: str | os.PathLike, step: int | None = None
  ) -> tuple[Any, Any, "Chosen"]:
    """Verified parameters and caches of a checkpoint.

    Args:
      workdir: of the run.
      step: which; None: the best by validation loss, or the newest valid one where
        none was scored.

    Returns:
      Parameters, caches, and which checkpoint they are of.

    Raises:
      ValueError: no such checkpoint, or none that is valid.
    """
    boxed = jax.eval_shape(lambda: self.init_params(jax.random.key(0)))
    places = sharding.parameter_shardings(boxed, self.mesh)
    whole = sharding.replicated(self.mesh)
    sized = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    params = jax.tree.map(sized, sharding.unboxed(boxed), places)
    memory = jax.eval_shape(self.model.initial_state)
    memory = jax.tree.map(lambda a: sized(a, whole), memory)
    with Checkpoints(workdir, read_only=True) as checkpoints:
      newest = checkpoints.latest_step()
      best = checkpoints.best_step() if step is None else step
      params, meta = checkpoints.restore_params(params, best)
      if self.model.memory is not None:
        memory, _ = checkpoints.restore_params(memory, meta["step"], "memory")
    by = "newest" if best is None else "validation" if step is None else "step"
    return params, memory, Chosen(meta["step"], by, newest or 0)


def identity(split: Examples) -> dict[str, Any]:
  """What a checkpoint keeps of a split, as JSON data: see `check_data`."""
  return {
    "tokens": split.about["tokens"],
    "documents": len(split),
    "sha256": split.about["sha256"],
    "hashed": "all",
  }
