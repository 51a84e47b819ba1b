"""A run of ours that begins with converted weights."""

import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cached_tx.convert.official import from_official_xl
from cached_tx.convert.weights import read_weights
from cached_tx.train import sharding
from cached_tx.train.checkpoint import Checkpoints
from cached_tx.train.config import to_json
from cached_tx.train.experiment import Experiment
from cached_tx.train.run_config import write_config
from cached_tx.train.state import configured_optimizer, init_state


def convert(
  config: ConfigDict, weights: str | os.PathLike, workdir: str | os.PathLike
) -> dict[str, Any]:
  """Makes a run of step 0 that has the weights of a file.

  Training goes on from there, with an empty memory and a new optimiser; evaluation
  and generation read it as any other run.

  Args:
    config: of the model that the weights are for. data.vocab names the file of its
      words, one a line, in the order of the ids of the weights.
    weights: a .safetensors or .npz file.
    workdir: a folder that has no run.

  Returns:
    JSON data: the workdir, the number of parameters, the size of the vocabulary.

  Raises:
    FileNotFoundError: no such file of weights, or of data.
    ValueError: weights and config do not fit, or the folder has a run: says what.
  """
  for name in ("config.json", "checkpoints"):
    if (Path(workdir) / name).exists():
      raise ValueError(f"{os.fspath(workdir)} has a run: give a new --workdir")
  if config.data.tokenizer != "bytes" and not config.data.vocab:
    raise ValueError(
      f"data.vocab is {config.data.vocab!r}; it must name a file with the words in the "
      "order of the weights' ids, one a line: a vocabulary that is counted here has "
      "another order"
    )
  experiment = Experiment(config)
  model, mesh = experiment.model, experiment.mesh
  params = from_official_xl(read_weights(weights), model)
  optimizer, _ = configured_optimizer(config, model)
  with sharding.on(mesh):
    state, shardings = init_state(
      model,
      optimizer,
      seed=config.seed,
      batch=config.batch,
      ema=config.optimizer.ema,
      mesh=mesh,
    )
    params = jax.tree.map(lambda a, like: a.astype(like.dtype), params, state.params)
    own = jax.device_put(params, shardings.params)
    average = jax.device_put(params, shardings.ema) if config.optimizer.ema else ()
    state = state.replace(params=own, ema=average)
    about = {"step": 0, "tokenizer": experiment.tokenizer.identity}
    with Checkpoints(workdir, keep=config.save.keep) as checkpoints:
      checkpoints.save(0, state, about)
    write_config(workdir, to_json(config))  # last: without it, nobody takes up the run
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  return {"workdir": os.fspath(workdir), "parameters": count, "vocab": model.vocab}
