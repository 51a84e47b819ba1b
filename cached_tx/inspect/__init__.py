"""What a config costs, found out without running anything: shapes only."""

from typing import Any

import jax

from cached_tx.inspect.flops import count_flops, forward_flops, training_flops
from cached_tx.inspect.sizes import (
  Parameter,
  abstract_mesh,
  activation_bytes,
  attended_slots,
  compiled_memory,
  device_bytes,
  parameter_table,
  state_bytes,
  state_bytes_by_layer,
  train_state,
)
from cached_tx.memory import kind_of
from cached_tx.models import DecoderLM
from cached_tx.tables import aligned, counted, size
from cached_tx.train.experiment import Experiment

__all__ = [
  "Parameter",
  "activation_bytes",
  "attended_slots",
  "compiled_memory",
  "count_flops",
  "forward_flops",
  "inspect",
  "parameter_table",
  "state_bytes",
  "text",
  "training_flops",
]


def inspect(experiment: Experiment, compiled: bool = False) -> dict[str, Any]:
  """All that can be said of a config before it runs, as JSON data.

  Args:
    experiment: of the config.
    compiled: also compile the training step and ask XLA for its memory.

  Raises:
    ValueError: a config that cannot be run.
  """
  config, model = experiment.config, experiment.model
  mesh = abstract_mesh(**config.mesh)
  sizes = dict(mesh.shape)
  state, places = train_state(experiment, mesh)
  table = parameter_table(model, mesh)
  rows = config.batch // (sizes["data"] * sizes["fsdp"])
  params = device_bytes(state.params, places.params)
  device = {
    "parameters": params,
    "gradients": params,
    "optimiser": device_bytes(state.opt_state, places.opt_state),
    "moving average": device_bytes(state.ema, places.ema),
    "memory state": device_bytes(state.memory, places.memory),
    "activations (bound)": rows * activation_bytes(model, config.segments),
  }
  result = {
    "parameters": sum(p.numbers for p in table),
    "table": [p._asdict() for p in table],
    "mesh": sizes,
    "devices": mesh.size,
    "devices_present": jax.device_count(),
    "layers": _layers(model),
    "segment": model.segment,
    "state_bytes_per_row": state_bytes(model),
    "stream_bytes_per_row": state_bytes(model, stream=True),
    "tokens_per_step": config.batch * config.segment * config.segments,
    "flops_per_token": {
      "forward": forward_flops(model, config.segments),
      "training": training_flops(model, config.segments),
    },
    "device_bytes": {**device, "total": sum(device.values())},
  }
  if compiled:
    result["compiled_device_bytes"] = compiled_memory(experiment)
  return result


def _layers(model: DecoderLM) -> list[dict[str, Any]]:
  """The memories of the period."""
  plain = state_bytes_by_layer(model, 1, stream=False)
  stream = state_bytes_by_layer(model, 1, stream=True)
  return [
    {
      "kind": kind_of(memory),
      "layers": list(range(i, model.layers, len(model.memories))),
      "attended_slots": slots,
      "state_bytes_per_row": plain[i],
      "stream_bytes_per_row": stream[i],
    }
    for i, (memory, slots) in enumerate(
      zip(model.memories, attended_slots(model), strict=True)
    )
  ]


def text(found: dict[str, Any]) -> str:
  """What `inspect` found, for people."""
  rows = [("parameter", "shape", "dtype", "divided over", "numbers")]
  for p in found["table"]:
    shape = " x ".join(map(str, p["shape"]))
    rows.append((p["path"], shape, p["dtype"], p["spec"], f"{p['numbers']:,}"))
  rows.append(("total", "", "", "", f"{found['parameters']:,}"))
  axes = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
  count, present = found["devices"], found["devices_present"]
  pretend = f" (only {present} present: nothing can run)" if count > present else ""
  flops = found["flops_per_token"]
  lines = [
    *aligned(rows),
    "",
    f"mesh                  {axes}: {counted(count, 'device')}{pretend}",
    f"tokens per step       {found['tokens_per_step']:,}",
    f"FLOPs per token       forward {flops['forward']:,.0f}, "
    f"training {flops['training']:,.0f} (matrix products)",
    "",
    *aligned([_LAYERS, *map(_layer, found["layers"])]),
    f"all layers, per row: {size(found['state_bytes_per_row'])}; within a segment: "
    f"{size(found['stream_bytes_per_row'])}",
    "",
    "one device holds, in training",
    *_sizes(found["device_bytes"]),
  ]
  if "compiled_device_bytes" in found:
    lines += [
      "",
      "one device needs, as compiled",
      *_sizes(found["compiled_device_bytes"]),
    ]
  return "\n".join(lines)


_LAYERS = ("memory", "layers", "attended slots", "state per row", "within a segment")


def _layer(own: dict[str, Any]) -> tuple[str, ...]:
  slots = own["attended_slots"]
  return (
    own["kind"],
    ", ".join(map(str, own["layers"])),
    "running sums" if slots is None else f"{slots}",
    size(own["state_bytes_per_row"]),
    size(own["stream_bytes_per_row"]),
  )


def _sizes(found: dict[str, int]) -> list[str]:
  return aligned([(f"  {name}", size(count)) for name, count in found.items()])
