"""Whole networks."""

import dataclasses
from typing import Any

from cached_tx.layers import Adaptive
from cached_tx.memory import MemoryModule, build_memory
from cached_tx.models.decoder import DecoderLM, last_step
from cached_tx.options import typed

__all__ = ["DecoderLM", "build_model", "last_step"]


def build_model(config: Any, vocab: int) -> DecoderLM:
  """Makes the model of a config (its keys model, memory, segment, tbptt).

  Args:
    config: a ConfigDict, or anything with these attributes and mappings.
    vocab: V.

  Raises:
    ValueError: naming the key, for settings that do not exist or do not fit.
  """
  options = dict(config.model)
  pattern = tuple(options.pop("pattern"))
  elsewhere = {"parent", "name", "vocab", "segment", "tbptt", "memories", "step"}
  fields = {field.name: field.type for field in dataclasses.fields(DecoderLM)}
  known = fields.keys() - elsewhere
  unknown = sorted(set(options) - known)
  if unknown:
    raise ValueError(f"model.{unknown[0]} is no option; there are: {sorted(known)}")
  options = typed("model.", options, fields)
  if options.get("vocabulary") is not None:
    options["vocabulary"] = _vocabulary(options["vocabulary"])
  model = DecoderLM(
    vocab=vocab,
    segment=config.segment,
    tbptt=config.tbptt,
    memories=_memories(dict(config.memory), pattern, options["dtype"]),
    **options,
  )
  model.check()
  return model


def _vocabulary(section: Any) -> Adaptive:
  if not hasattr(section, "keys"):  # a mapping, or a ConfigDict
    raise ValueError(
      f"model.vocabulary is {section!r}; it is a section with the keys "
      f"{', '.join(Adaptive._fields)}, or None"
    )
  options = dict(section)
  unknown = sorted(set(options) - set(Adaptive._fields))
  if unknown:
    raise ValueError(
      f"model.vocabulary.{unknown[0]} is no option; there are: "
      f"{', '.join(Adaptive._fields)}"
    )
  return Adaptive(**typed("model.vocabulary.", options, Adaptive.__annotations__))


def _memories(memory: dict, pattern: tuple[str, ...], dtype: str) -> tuple:
  if not pattern:
    return (_memory(memory, dtype, "memory"),)
  for name in pattern:
    if name not in memory:
      raise ValueError(
        f"model.pattern names {name!r}, but memory has only {sorted(memory)}"
      )
  return tuple(_memory(dict(memory[name]), dtype, f"memory.{name}") for name in pattern)


def _memory(options: dict, dtype: str, section: str) -> MemoryModule:
  if "kind" not in options:
    raise ValueError(
      f"{section} has no key 'kind' but {sorted(options)}; give one, or name the "
      "memories of a period in model.pattern"
    )
  if "dtype" in options:
    raise ValueError(
      f"{section}.dtype is {options['dtype']!r}, but memories compute in the dtype of "
      "the model: drop the key, or change model.dtype"
    )
  memory = build_memory(**options, section=section)
  return memory.clone(dtype=dtype) if hasattr(memory, "dtype") else memory
