"""How well a trained model predicts a whole split, with its memory and without."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cached_tx.data import counts, tokenize
from cached_tx.inspect import attended_slots
from cached_tx.tables import aligned, counted
from cached_tx.train import sharding
from cached_tx.train.evaluation import Evaluation, Evaluator, Reading, check_memory
from cached_tx.train.experiment import Experiment
from cached_tx.train.saved_step import Mismatch


def evaluate(
  workdir: str | os.PathLike,
  *,
  split: str = "test",
  memory: Sequence[str] = ("kept",),
  changes: Sequence[str] = (),
  rows: int = 0,
  segments: int = 0,
  ordered: bool = False,
  step: int | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint.

  Args:
    workdir: of the training run.
    split: train, validation or test.
    memory: what each segment reads, see `Evaluator`: one or more of kept, zeroed,
      shuffled, stale.
    changes: to the config, such as memory.size=512 or segment=64.
    rows: lanes that the text is cut into; 0: eval.batch. Each but the first begins
      inside a document without memory, so fewer are kinder, and slower.
    segments: at most so many of every lane; 0: the whole split.
    ordered: the text is one document in lanes as Transformer-XL's code cuts it, for
      comparisons with published numbers: see `OrderedBatches`.
    step: of the checkpoint; None for the newest valid one.

  Returns:
    JSON data, see `measured`; also the step.

  Raises:
    FileNotFoundError: nothing was trained in `workdir`.
    ValueError: an argument out of its range, or a change that does not fit.
  """
  own = opened(
    workdir,
    changes=changes,
    rows=rows,
    segments=segments,
    step=step,
    check=lambda _, rows: check_memory(memory, rows),
  )
  reads: Any = dict(split=split, rows=own.rows, segments=segments, ordered=ordered)
  steps = own.about["step"]
  found = measured(own.experiment, own.params, steps=steps, memory=memory, **reads)
  return {**own.about, **found}


class Opened(NamedTuple):
  """A checkpoint to read a text with.

  Attributes:
    experiment: of the run, on devices among which the rows can be divided.
    params: restored.
    rows: of the text.
    about: what that is, as JSON data: workdir, step, set.
  """

  experiment: Experiment
  params: Any
  rows: int
  about: dict[str, Any]


def opened(
  workdir: str | os.PathLike,
  *,
  changes: Sequence[str] = (),
  rows: int = 0,
  segments: int = 0,
  step: int | None = None,
  check: Callable[[Experiment, int], Any] = lambda experiment, rows: None,
) -> Opened:
  """Restores a checkpoint; arguments and errors as of `evaluate`.

  `check` gets the experiment and the rows before anything large is read.
  """
  given = Experiment.of(workdir, changes=changes)
  rows = rows or given.config.eval.batch
  if rows < 1 or segments < 0:
    raise ValueError(
      f"rows={rows}, segments={segments}: 1 or more, and 0 (all) or more"
    )
  check(given, rows)
  experiment = Experiment(given.config, usable_mesh(given, rows))
  try:
    params, step = experiment.restore_params(workdir, step)
  except Mismatch as error:
    if not changes:
      raise
    raise ValueError(
      f"{error}\nSet was {', '.join(changes)}. After training may be set what no weight"
      " depends on: segment, the sizes of a memory (memory.size, memory.compressed),"
      " data, eval."
    ) from None
  about = {"workdir": os.fspath(workdir), "step": step, "set": [*changes]}
  return Opened(experiment, params, rows, about)


def usable_mesh(experiment: Experiment, rows: int) -> Mesh:
  """The config's mesh; if it does not fit devices and rows, all devices, or one."""
  tried = [dict(experiment.config.mesh)]
  tried.append({**dict.fromkeys(tried[0], 1), "data": -1})
  for axes in tried:
    try:
      mesh = sharding.make_mesh(**axes)
    except ValueError:
      continue
    if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
      return mesh
  if jax.process_count() > 1:
    raise ValueError(
      f"{rows} rows cannot be divided among {jax.device_count()} devices: change rows"
    )
  return sharding.one_device()


def measured(
  experiment: Experiment,
  params: Any,
  *,
  steps: int,
  split: str,
  memory: Sequence[str] = ("kept",),
  rows: int,
  segments: int = 0,
  ordered: bool = False,
) -> dict[str, Any]:
  """Evaluates parameters, which so many training steps made, on a split.

  Returns:
    JSON data: what was read (split, documents, bytes, words and the rule by which
    they were counted, targets, whether it was the whole split), how (rows, segment,
    whether in the order of `OrderedBatches`, attended slots of every layer of the
    period), and "scores": for each choice of memory the loss in nats per token, bits
    per byte, perplexity per token, and per word where the whole split was
    predicted (else None).

  Raises:
    ValueError: an unknown split or memory.
  """
  check_memory(memory, rows)  # before the split is tokenised, which may take minutes
  model = experiment.model.after(steps)
  documents = experiment.documents(split)
  size = counts(documents)
  tokens = tokenize(documents, experiment.tokenizer)
  with sharding.on(experiment.mesh):
    cut: Any = dict(rows=rows, segments=segments, ordered=ordered)
    reading = Reading(model, tokens, mesh=experiment.mesh, **cut)
    results = Evaluator(model, reading)(params, memory)
  every = len(tokens.flat) - len(tokens.begins)
  whole = reading.count == len(reading.batches)
  return {
    "data": experiment.config.data.name,
    "split": split,
    "whole": whole,
    "documents": size.documents,
    "bytes": size.bytes,
    "words": size.words,
    "words_rule": size.rule,
    "targets": next(iter(results.values())).targets,
    "rows": rows,
    "ordered": ordered,
    "segment": model.segment,
    "attended_slots": attended_slots(model),
    "devices": experiment.mesh.size,
    "scores": {
      name: _score(
        result, size.bytes / every, size.words if whole and not ordered else None
      )
      for name, result in results.items()
    },
  }


def _score(
  result: Evaluation, bytes_per_token: float, words: int | None
) -> dict[str, float | None]:
  per_word = _exp(result.nats / words) if words else None
  return {
    "loss": result.loss,
    "bits_per_byte": result.loss / math.log(2) / bytes_per_token,
    "perplexity": _exp(result.loss),
    "word_perplexity": per_word,
  }


def _exp(nats: float) -> float | None:
  """None where it is larger than any float."""
  return math.exp(nats) if nats < 700 else None


def text(found: dict[str, Any]) -> str:
  """What `evaluate` found, for people."""
  kinds = ["running sums" if s is None else f"{s}" for s in found["attended_slots"]]
  part = "whole split" if found["whole"] else "beginning of every row only"
  if found["ordered"]:
    part += ", as one text in equal lanes, its tail dropped"
  lines = [
    f"{found['data']} {found['split']}, {part}: "
    f"{counted(found['targets'], 'token')} predicted of "
    f"{counted(found['bytes'], 'byte')} in {counted(found['documents'], 'document')}, "
    f"{counted(found['words'], 'word')} ({found['words_rule']})",
    f"checkpoint of step {found['step']}, {counted(found['rows'], 'row')} on "
    f"{counted(found['devices'], 'device')}, segment {found['segment']}, attended "
    f"slots {', '.join(kinds)}" + "".join(f", {change}" for change in found["set"]),
    "",
  ]
  head = ("memory", "bits/byte", "nats/token", "perplexity/token", "perplexity/word")
  rows = [head]
  for name, score in found["scores"].items():
    word, token = score["word_perplexity"], score["perplexity"]
    rows.append((
      name,
      f"{score['bits_per_byte']:.4f}",
      f"{score['loss']:.4f}",
      "-" if token is None else f"{token:,.3f}",
      "-" if word is None else f"{word:,.4g}",
    ))  # fmt: skip
  return "\n".join([*lines, *aligned(rows), *_notes(found)])


def _notes(found: dict[str, Any]) -> list[str]:
  """Why a perplexity is not there."""
  scores, notes = found["scores"].values(), []
  if any(score["word_perplexity"] is None for score in scores):
    if not found["whole"]:
      notes = ["perplexity/word: only where a whole split is read, without --segments"]
    elif found["ordered"]:
      notes = ["perplexity/word: not with --ordered, which drops the tail of the text"]
    elif not found["words"]:
      notes = ["perplexity/word: the text has no words"]
  if not notes and any(None in score.values() for score in scores):
    notes = ["perplexity: larger than any float"]
  return ["", *notes] if notes else []
