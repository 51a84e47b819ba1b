"""Where a trained model's attention goes: Rae et al., 2019, arXiv:1911.05507, 5.5."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cached_tx.data import tokenize
from cached_tx.evaluate import opened
from cached_tx.memory import kind_of
from cached_tx.models import DecoderLM
from cached_tx.tables import aligned, counted
from cached_tx.train import sharding
from cached_tx.train.attended import PARTS, Group, Tally, groups, observe
from cached_tx.train.evaluation import Reading
from cached_tx.train.experiment import Experiment
from cached_tx.train.plots import attention_plot

PLOT = "attention.png"


def analyse(
  workdir: str | os.PathLike,
  *,
  split: str = "test",
  changes: Sequence[str] = (),
  rows: int = 0,
  segments: int = 0,
  full: bool = False,
  step: int | None = None,
) -> dict[str, Any]:
  """Analyses a checkpoint, and draws attention.png in its folder.

  Args:
    workdir: of the training run.
    split: train, validation or test.
    changes: to the config, such as memory.size=512 or segment=64.
    rows: lanes that the text is cut into; 0: eval.batch.
    segments: at most so many of every lane; 0: the whole split.
    full: count only segments that find every slot of the memory valid and in which no
      document begins, as in the paper, whose texts are one document.
    step: of the checkpoint; None for the newest valid one.

  Returns:
    JSON data, see `measured`; also the step and where the plot lies.

  Raises:
    FileNotFoundError: nothing was trained in `workdir`.
    ValueError: an argument out of its range, a change that does not fit, no layer that
      gives weights to keys, or no segment that counts.
  """
  own = opened(
    workdir,
    changes=changes,
    rows=rows,
    segments=segments,
    step=step,
    check=lambda experiment, _: groups(experiment.model),
  )
  reads: Any = dict(split=split, rows=own.rows, segments=segments, full=full)
  steps = own.about["step"]
  found = {**own.about, **measured(own.experiment, own.params, steps=steps, **reads)}
  title = f"{_text(found)}\n{_checkpoint(found)}; {_counted(found)}"
  path = attention_plot(found, Path(workdir) / PLOT, title=title)
  return {**found, "plot": os.fspath(path)}


def measured(
  experiment: Experiment,
  params: Any,
  *,
  steps: int,
  split: str,
  rows: int,
  segments: int = 0,
  full: bool = False,
) -> dict[str, Any]:
  """Analyses parameters that so many training steps made; arguments as of `analyse`.

  A sample is one segment of one row; segments that end in padding are left out.
  Standard errors are of the mean of samples, as if these were independent.

  Returns:
    JSON data: what was read, and

    groups: of layers of one kind: bucket by bucket, the oldest first, its region and
      part, how many keys it has, the attention that it got (mass: mean over heads,
      queries, samples and the layers; with its error) and the share of its keys that a
      query could see (None without keys). Masses sum to 1, less what the zero tokens
      before a document got (memory.start zeros).
    layers: of each layer its group, and the same masses and errors; its auxiliary
      losses, by name, as training adds them, over the samples in which there was
      something to compress; beside a cache, the share of the output that came from it;
      its gauges. Layers of running sums have no group and no masses (None).

  Raises:
    ValueError: an unknown split, or no segment that counts.
  """
  model, mesh = experiment.model.after(steps), experiment.mesh
  own = groups(model)
  tokens = tokenize(experiment.documents(split), experiment.tokenizer)
  tallies: list[dict[str, Tally]] = [{} for _ in own]
  with sharding.on(mesh):
    reading = Reading(model, tokens, rows=rows, mesh=mesh, segments=segments)
    step = jax.jit(
      lambda params, state, batch: observe(
        model, params, batch.tokens, batch.starts, state
      ),
      out_shardings=(sharding.replicated(mesh), reading.kept),
    )
    state = reading.empty()
    for index in range(reading.count):
      batch = reading.batches[index]
      last = np.stack([batch.tokens[:, -1], batch.targets[:, -1]])
      real = (last != tokens.bos).any(axis=0)  # padding is BOS after BOS
      told, state = step(params, state, reading.feed(batch))
      for tally, values in zip(tallies, jax.device_get(told), strict=True):
        _count(tally, values, real, full)
    gauges = jax.device_get(jax.jit(model.gauges)(params))
  for group, tally in zip(own, tallies, strict=True):
    if not tally["mean"].count.any():
      raise ValueError(
        f"none of {reading.count} segments in {rows} rows counts for memory.kind "
        f"{group.kind}: "
        + (
          "with full, one must find every slot valid and begin no document; give more "
          "segments, or leave out full"
          if full
          else "all of them end in padding; give fewer rows"
        )
      )
  return {
    "data": experiment.config.data.name,
    "split": split,
    "rows": rows,
    "segments": reading.count,
    "segment": model.segment,
    "full": full,
    "devices": mesh.size,
    "groups": [_shared(g, t) for g, t in zip(own, tallies, strict=True)],
    "layers": _layers(model, own, tallies, gauges),
  }


def _count(
  tally: dict[str, Tally], told: Mapping[str, Any], real: np.ndarray, full: bool
) -> None:
  """Adds the rows of a segment."""

  def add(name: str, values: np.ndarray, counted: np.ndarray) -> None:
    tally.setdefault(name, Tally()).add(values, counted)

  counted = real & told["full"].all(axis=0) if full else real
  add("mass", told["mass"], counted)
  add("mean", told["mass"].mean(axis=0), counted)
  add("visible", told["visible"].mean(axis=0), counted)
  for name, loss in told["losses"].items():
    add(f"loss {name}", loss, counted & (loss > 0))
  if "share" in told:
    add("share", told["share"], counted & told["reached"] if full else counted)


def _number(value: Any) -> float | None:
  return None if np.isnan(value) else float(value)


def _shared(group: Group, tally: dict[str, Tally]) -> dict[str, Any]:
  """What the layers of a group have in common."""
  names = [(name, part) for name, _ in group.regions for part in range(1, PARTS + 1)]
  found, visible = tally["mean"], tally["visible"].mean()
  columns = zip(names, group.keys, found.mean(), found.error(), visible, strict=True)
  return {
    "memory": group.kind,
    "layers": [*group.layers],
    "samples": int(found.count.max()),
    "buckets": [
      {
        "region": name,
        "part": part,
        "keys": keys,
        "mass": float(mass),
        "error": _number(error),
        "visible": float(seen) if keys else None,
      }
      for (name, part), keys, mass, error, seen in columns
    ],
  }


def _layers(
  model: DecoderLM,
  own: Sequence[Group],
  tallies: Sequence[dict[str, Tally]],
  gauges: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """What each layer has of its own."""
  kinds = [kind_of(memory) for memory in model.memories]
  nothing = {"group": None, "mass": None, "error": None}
  found: list[dict[str, Any]] = [
    {"layer": i, "memory": kinds[i % len(kinds)], **nothing}
    for i in range(model.layers)
  ]

  def summary(tally: Tally, i: int) -> dict[str, Any]:
    mean, error = tally.mean()[i], tally.error()[i]
    count = int(tally.count[i])
    return {"mean": _number(mean), "error": _number(error), "samples": count}

  for number, (group, tally) in enumerate(zip(own, tallies, strict=True)):
    for i, layer in enumerate(group.layers):
      mass = tally["mass"]
      found[layer]["group"] = number
      found[layer]["mass"] = [float(m) for m in mass.mean()[i]]
      found[layer]["error"] = [_number(e) for e in mass.error()[i]]
      losses = {n: t for n, t in tally.items() if n.startswith("loss ")}
      found[layer]["losses"] = {
        name.removeprefix("loss "): summary(loss, i) for name, loss in losses.items()
      }
      if "share" in tally:
        found[layer]["share_of_cache"] = summary(tally["share"], i)
  for name, value in gauges.items():
    gauge, place, _ = name.split("/")
    found[int(place)].setdefault(gauge, []).append(float(value))
  return found


def _text(found: dict[str, Any]) -> str:
  segments, length = found["segments"], counted(found["segment"], "token")
  return (
    f"{found['data']} {found['split']}, {counted(segments, 'segment')} of {length} in "
    f"each of {counted(found['rows'], 'row')}"
  )


def _checkpoint(found: dict[str, Any]) -> str:
  return ", ".join([f"checkpoint of step {found['step']}", *found["set"]])


def _counted(found: dict[str, Any]) -> str:
  which = "with a full memory and without a start" if found["full"] else "all"
  return f"counted: {which}"


def text(found: dict[str, Any]) -> str:
  """What `analyse` found, for people."""
  lines = [f"{_text(found)}; {_counted(found)}", _checkpoint(found)]
  for group in found["groups"]:
    layers = ", ".join(map(str, group["layers"]))
    lines += [
      "",
      f"attention of {group['memory']}, mean of layers {layers}, over "
      f"{counted(group['samples'], 'segment')}; oldest first",
      "",
    ]
    rows = [("bucket", "keys", "attention %", "± error", "visible %")]
    for own in group["buckets"]:
      rows.append((
        f"{own['region']} {own['part']}/{PARTS}",
        f"{own['keys']}",
        f"{100 * own['mass']:.3f}",
        _form(own["error"], 100.0, ".3f"),
        _form(own["visible"], 100.0, ".1f"),
      ))  # fmt: skip
    lines += aligned(rows)
  lines += ["", *aligned(_layer_rows(found)), "", f"plot: {found['plot']}"]
  return "\n".join(lines)


def _form(value: float | None, factor: float, form: str) -> str:
  return "-" if value is None else format(factor * value, form)


def _layer_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """A line for every layer: attention by region, losses, the share of a cache."""
  regions = [[b["region"] for b in group["buckets"]] for group in found["groups"]]
  names = list(dict.fromkeys(name for own in regions for name in own))
  layers = found["layers"]
  losses = list(dict.fromkeys(n for layer in layers for n in layer.get("losses", {})))
  caches = any("share_of_cache" in layer for layer in layers)
  head = ["layer", "memory", *(f"{name} %" for name in names)]
  head += [f"{name} loss" for name in losses] + ["from cache %"] * caches
  rows = [tuple(head)]
  for layer in layers:
    row = [f"{layer['layer']}", layer["memory"]]
    for name in names:
      own = [] if layer["group"] is None else regions[layer["group"]]
      pairs = zip(own, layer["mass"] or [], strict=True)
      mass = [m for region, m in pairs if region == name]
      row.append(_form(sum(mass) if mass else None, 100.0, ".2f"))
    for name in losses:
      loss = layer.get("losses", {}).get(name, {})
      error = _form(loss.get("error"), 1.0, ".2g")
      row.append(f"{_form(loss.get('mean'), 1.0, '.4g')} ± {error}")
    if caches:
      share = layer.get("share_of_cache", {}).get("mean")
      row.append(_form(share, 100.0, ".2f"))
    rows.append(tuple(row))
  return rows
