"""Attentions of encoders, by name. A new one is a file of this folder and a line here.

Each is called as `attention(x, segment, deterministic=...)` and returns heads. A row is
one document.
"""

from typing import Any

from cached_tx.layers.attentions.bigbird import BigBirdAttention
from cached_tx.layers.attentions.linear import LinearAttention
from cached_tx.layers.attentions.linformer import LinformerAttention
from cached_tx.layers.attentions.local import LocalAttention
from cached_tx.layers.attentions.longformer import LongformerAttention
from cached_tx.layers.attentions.performer import PerformerAttention
from cached_tx.layers.attentions.recurrent import RecurrentAttention
from cached_tx.layers.attentions.reformer import ReformerAttention
from cached_tx.layers.attentions.sinkhorn import SinkhornAttention
from cached_tx.layers.attentions.sparse import SparseAttention
from cached_tx.layers.attentions.synthesizer import SynthesizerAttention
from cached_tx.layers.attentions.transformer import TransformerAttention

ATTENTIONS: dict[str, Any] = {
  "transformer": TransformerAttention,
  "local": LocalAttention,
  "sparse": SparseAttention,
  "longformer": LongformerAttention,
  "linformer": LinformerAttention,
  "reformer": ReformerAttention,
  "sinkhorn": SinkhornAttention,
  "synthesizer": SynthesizerAttention,
  "bigbird": BigBirdAttention,
  "linear": LinearAttention,
  "performer": PerformerAttention,
  "recurrent": RecurrentAttention,
}

__all__ = ["ATTENTIONS", *(attention.__name__ for attention in ATTENTIONS.values())]
