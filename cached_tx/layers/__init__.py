"""Attention layers that own a memory, and what stands around them in a block.

A new attention is one file of this folder and one line of `READERS`: memories name
the reader that they need (memory/base.py).
"""

from typing import Any

from cached_tx.layers.analysis import ANALYSIS, Attended, Blended
from cached_tx.layers.base import MemoryAttention
from cached_tx.layers.block import NORMS, Block, layer_norm
from cached_tx.layers.clock import Stream, is_stream
from cached_tx.layers.dropout import Dropout, check_rate
from cached_tx.layers.encoder import EncoderAttention, GatedEncoderAttention
from cached_tx.layers.favor import FavorCrossAttention, FavorEncoderAttention
from cached_tx.layers.gated import GatedAttention, GatedState
from cached_tx.layers.mlp import ACTIVATIONS, MLP
from cached_tx.layers.slots import SlotAttention
from cached_tx.layers.sums import SumsAttention
from cached_tx.layers.vocabulary import (
  Adaptive,
  AdaptiveVocabulary,
  Vocabulary,
  vocabulary_for,
)
from cached_tx.memory import MemoryModule

READERS: dict[str, type[MemoryAttention]] = {
  "slots": SlotAttention,
  "gated": GatedAttention,
  "sums": SumsAttention,
}


def attention_for(memory: MemoryModule, **options: Any) -> MemoryAttention:
  """The attention layer that reads `memory`; options as of `MemoryAttention`."""
  own = memory.clone(parent=None)  # its parameters belong to the layer
  layer = READERS[memory.reader](memory=own, **options)
  layer.check()
  return layer


def has_option(memory: MemoryModule, name: str) -> bool:
  """Whether the layer that reads `memory` has this attribute."""
  return name in READERS[memory.reader].__dataclass_fields__


__all__ = [
  "ACTIVATIONS",
  "ANALYSIS",
  "MLP",
  "NORMS",
  "READERS",
  "Adaptive",
  "AdaptiveVocabulary",
  "Attended",
  "Blended",
  "Block",
  "Dropout",
  "EncoderAttention",
  "FavorCrossAttention",
  "FavorEncoderAttention",
  "GatedAttention",
  "GatedEncoderAttention",
  "GatedState",
  "MemoryAttention",
  "SlotAttention",
  "Stream",
  "SumsAttention",
  "Vocabulary",
  "attention_for",
  "check_rate",
  "has_option",
  "is_stream",
  "layer_norm",
  "vocabulary_for",
]
