"""What a config of the Long Range Arena holds; every key is checked."""

from collections.abc import Mapping
from typing import Any

from cached_tx.train.config import check_keys

TOP = ("seed", "steps", "batch", "log_every")  # as of cached_tx.train.config
SECTIONS: dict[str, tuple[str, ...]] = {
  "task": ("name", "path", "length"),
  "model": (
    "attention", "layers", "width", "qkv", "mlp", "heads", "pool", "positions",
    "interaction", "dropout", "attention_dropout", "dtype",
  ),
  "optimizer": (
    "rate", "schedule", "warmup", "decay", "b1", "b2", "epsilon", "clip", "accumulate",
  ),
  "mesh": ("data", "fsdp", "tensor", "sequence"),
  "eval": ("every", "batch", "examples"),
  "save": ("every", "keep"),
}  # fmt: skip
FREE = ("attention", "memory")  # whose keys are those of their kind
SCHEDULES = ("rsqrt", "cosine", "constant")


def check(config: Mapping[str, Any]) -> None:
  """Raises ValueError for keys that are missing, unknown, or out of range."""
  check_keys("", config, (*TOP, *SECTIONS, *FREE))
  for name, keys in SECTIONS.items():
    check_keys(f"{name}.", config[name], keys)
  own, held = config["optimizer"], config["eval"]
  whole = lambda value, least: type(value) is int and value >= least
  every, saved = held["every"], config["save"]["every"]
  rules = (
    *((key, config[key], whole(config[key], 1), "a whole number, 1 or more")
      for key in ("steps", "batch", "log_every")),
    ("task.length", config["task"]["length"], whole(config["task"]["length"], 1),
     "a whole number, 1 or more"),
    ("eval.every", held["every"], whole(held["every"], 0), "0 (off) or more"),
    ("eval.batch", held["batch"], whole(held["batch"], 1), "1 row or more"),
    ("eval.examples", held["examples"], whole(held["examples"], 0), "0 (all) or more"),
    ("save.every", config["save"]["every"], whole(config["save"]["every"], 0),
     "0 (off) or more"),
    ("eval.every", every, not saved or not every or every % saved == 0,
     f"a multiple of save.every, {saved}, or the scores of other steps would be lost"),
    ("seed", config["seed"], whole(config["seed"], 0), "a whole number, 0 or more"),
    ("optimizer.rate", own["rate"], own["rate"] > 0, "above 0"),
    *((f"optimizer.{key}", own[key], 0 <= own[key] < 1, "at least 0 and below 1")
      for key in ("b1", "b2")),
    ("optimizer.epsilon", own["epsilon"], own["epsilon"] > 0, "above 0"),
    ("optimizer.schedule", own["schedule"], own["schedule"] in SCHEDULES,
     f"one of {', '.join(SCHEDULES)}"),
    ("optimizer.warmup", own["warmup"], whole(own["warmup"], 1), "1 update or more"),
    ("optimizer.decay", own["decay"], own["decay"] >= 0, "0 or more"),
    ("optimizer.clip", own["clip"], own["clip"] >= 0, "a norm: 0 (off) or more"),
    ("optimizer.accumulate", own["accumulate"], whole(own["accumulate"], 1),
     "a number of steps, 1 or more"),
  )  # fmt: skip
  for key, value, holds, rule in rules:
    if not holds:
      raise ValueError(f"{key} is {value!r}; it must be {rule}")
