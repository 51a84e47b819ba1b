"""Which options of a compressive memory exist, and which go together."""

from typing import Any

from cached_tx.ops.compress import NORMS, ORDERS

LEARNED = ("conv", "dilated")
CHOICES = {
  "compressor": ("mean", "max", *LEARNED, "most_used"),
  "loss": ("attention", "autoencoding", "none"),
  "padding": ("causal", "valid"),
  "order": ORDERS,
  "usage": ("segment", "life"),
  "remainder": ("refuse", "drop"),
  "norm": NORMS,
  "products": ("scaled", "plain"),
  "queries": ("segment", "later"),
  "gradient": ("carry", "slots"),
  "tables": ("one", "two"),
}
READ_BY = {  # options that only some compressors or losses read
  "overlap": ("compressor", LEARNED),
  "dilations": ("compressor", ("dilated",)),
  "padding": ("compressor", LEARNED),
  "order": ("compressor", ("most_used",)),
  "usage": ("compressor", ("most_used",)),
  "norm": ("loss", ("attention", "autoencoding")),
  "weight": ("loss", ("attention", "autoencoding")),
  "products": ("loss", ("attention",)),
  "queries": ("loss", ("attention",)),
}


def check(memory: Any, segment: int) -> None:
  """Checks the options of a `CompressiveMemory`.

  Raises:
    ValueError: naming the key, for values that do not exist or do not fit.
  """
  for name, known in CHOICES.items():
    value = getattr(memory, name)
    if value not in known:
      raise ValueError(f"memory.{name} is {value!r}; one of {', '.join(known)}")
  _check_sizes(memory)
  memory.check_past()
  _check_losses(memory)
  _check_unread(memory)
  _check_reach(memory, segment)


def _check_sizes(memory: Any) -> None:
  if memory.size < 0 or memory.compressed < 0:
    raise ValueError(
      f"memory.size and memory.compressed are {memory.size} and {memory.compressed}; "
      "both count slots: 0 or more"
    )
  if memory.rate < 1 or memory.overlap < 0:
    raise ValueError(
      f"memory.rate and memory.overlap are {memory.rate} and {memory.overlap}; they "
      "count tokens: 1 or more, and 0 or more"
    )
  if not memory.dilations or min(memory.dilations) < 1:
    raise ValueError(
      f"memory.dilations is {memory.dilations}; one or more distances in tokens, each "
      "1 or more: for none, set memory.compressor to conv"
    )
  if memory.tables == "two" and not memory.compressed:
    raise ValueError(
      "memory.tables is 'two' and memory.compressed 0: the second table is that of "
      "the compressed slots; set memory.tables to one"
    )


def _check_losses(memory: Any) -> None:
  learned = memory.compressor in LEARNED
  if memory.loss != "none" and not learned:
    raise ValueError(
      f"memory.loss is {memory.loss!r}, but memory.compressor {memory.compressor!r} "
      "has nothing to train: set memory.loss to none, or memory.compressor to one of "
      f"{', '.join(LEARNED)}"
    )
  if learned and not memory.compressed:
    raise ValueError(
      f"memory.compressed is 0, so what memory.compressor {memory.compressor!r} learns "
      "would never be read: set memory.compressor to mean and memory.loss to none, or "
      "memory.kind to xl"
    )
  if memory.weight <= 0:
    raise ValueError(
      f"memory.weight is {memory.weight}; it must be above 0: to have no loss, set "
      "memory.loss to none"
    )
  if memory.queries == "later" and not memory.size:
    raise ValueError(
      "memory.queries is 'later' and memory.size 0, so that no query comes after the "
      "tokens that are replaced: set memory.queries to segment"
    )


def _check_unread(memory: Any) -> None:
  for name, (by, readers) in READ_BY.items():
    value, chosen = getattr(memory, name), getattr(memory, by)
    default = type(memory).__dataclass_fields__[name].default
    if value != default and chosen not in readers:
      raise ValueError(
        f"memory.{name} is {value!r}, which memory.{by} {chosen!r} does not read: "
        f"leave it {default!r}, or set memory.{by} to one of {', '.join(readers)}"
      )


def _check_reach(memory: Any, segment: int) -> None:
  reach = memory.reach
  if memory.padding == "valid" and reach.span == memory.rate:
    raise ValueError(
      "memory.padding is 'valid', but slots see no more than their own "
      f"{memory.rate} tokens, so that there is no edge: leave it 'causal', or set "
      "memory.overlap"
    )
  if not reach.count(segment):
    raise ValueError(
      f"memory.rate is {memory.rate}, and a slot is made of {reach.span - reach.left} "
      f"tokens; a segment of {segment} would make none: change memory.rate or segment"
    )
  if memory.remainder == "refuse" and reach.rest(segment):
    edge = 0 if reach.left else reach.span - memory.rate
    less = f" less the {edge} that each slot sees besides" if edge else ""
    raise ValueError(
      f"memory.rate is {memory.rate}; it must divide the segment of {segment} tokens"
      f"{less}, or the newest {reach.rest(segment)} would be dropped: change "
      "memory.rate or segment, or set memory.remainder to drop"
    )
