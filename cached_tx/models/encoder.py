"""Encoders that classify whole rows, with an attention chosen by name.

The shared model of the Long Range Arena (Tay et al., 2021, arXiv:2011.04006): norms
before attention and MLP, one after all blocks, a token or the mean of all as what the
head sees. Any of its attentions may have a cache beside it, shared by all rows (Zhang
et al., 2024, arXiv:2312.12742).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cached_tx.layers import MLP, Dropout, GatedEncoderAttention, check_rate, layer_norm
from cached_tx.layers.attentions import ATTENTIONS
from cached_tx.layers.projections import FromHeads
from cached_tx.memory import GRCMemory, GRCState, partitioned
from cached_tx.options import typed
from cached_tx.types import DType, Hidden, Mask, Segment

POOLS = ("cls", "first", "mean")
POSITIONS = ("sinusoidal", "learned", "none")
INTERACTIONS = ("concat", "nli")

State = tuple[GRCState, ...]


def sinusoids(length: int, width: int) -> Float[np.ndarray, "L D"]:
  """Sines and cosines of positions, in turns: Vaswani et al., 2017, section 3.5."""
  rates = np.exp(np.arange(0, width, 2) * (-np.log(10_000.0) / width))
  angles = np.arange(length)[:, None] * rates
  table = np.zeros((length, width), np.float32)
  table[:, 0::2] = np.sin(angles)
  table[:, 1::2] = np.cos(angles)[:, : width // 2]
  return table


class EncoderBlock(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)).

  Attributes:
    attention: gives heads, or is a `GatedEncoderAttention`, and gives channels.
    mlp: the position-wise network.
    dropout: rate on what the attention adds.
    dtype: of the computation.
  """

  attention: nn.Module
  mlp: MLP
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(
    self, x: Hidden, state: Any, segment: Segment, *, deterministic: bool
  ) -> tuple[Hidden, Any]:
    """Returns the hidden state, 0 at padding, and the state of the cache, if any."""
    real = segment.real[..., None]
    norm = lambda name: layer_norm(self.dtype, 1e-6, True, name=name)
    x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
    own = jnp.where(real, norm("attention_norm")(x), 0)
    attention: Any = self.attention
    if isinstance(attention, GatedEncoderAttention):
      y, state, _ = attention(own, state, segment, deterministic=deterministic)
    else:
      heads = attention(own, segment, deterministic=deterministic)
      heads = jnp.where(real[..., None], heads, 0)
      output = FromHeads(x.shape[-1], 1.0, self.dtype, xavier=True, name="output")
      y = output(heads)
    x = x + Dropout(self.dropout)(y, deterministic=deterministic)
    x = x + self.mlp(norm("mlp_norm")(x), deterministic=deterministic)
    return jnp.where(real, x, 0), state


class EncoderClassifier(nn.Module):
  """One class for each example, which is one row of tokens or a pair of rows.

  A padded token does not exist, and a mask says what is padding, no id does: the
  logits of a row are those of the row without its padding, if that is at its end.
  In evaluation they do not depend on other rows.

  Attributes:
    vocab: V.
    classes: that there are.
    max_len: the most tokens of a row, a class token not counted.
    layers: N.
    width: D.
    heads: H.
    mlp: F, also the width of the head's hidden layer.
    attention: a key of `cached_tx.layers.attentions.ATTENTIONS`.
    options: of that attention, by name.
    qkv: channels of queries, keys and values, H K; 0: D.
    inputs: rows of an example, 1 or 2. Two are encoded by the same parameters.
    pool: what the head sees of a row: cls, a learned token before it; first, its first
      token; mean, over its real tokens.
    interaction: of two encodings a, b: concat, [a, b]; nli, [a, b, a b, a - b].
    positions: sinusoidal, learned (normal, 0.02) or none: added to embeddings.
    memory: a cache in shared scope, beside the attention of every layer; its `size` of
      0 stands for as many slots as a row has tokens. None: no cache.
    dropout: rate on embeddings and in every branch.
    attention_dropout: rate on attention weights, where an attention has some.
    seed: of what attentions draw once: graphs, rotations, features; an option `seed` of
      the attention comes before it.
    dtype: of the computation. Parameters and logits are float32.
  """

  vocab: int
  classes: int
  max_len: int
  layers: int
  width: int
  heads: int
  mlp: int
  attention: str = "transformer"
  options: Mapping[str, Any] | None = None
  qkv: int = 0
  inputs: int = 1
  pool: str = "cls"
  interaction: str = "nli"
  positions: str = "sinusoidal"
  memory: GRCMemory | None = None
  dropout: float = 0.0
  attention_dropout: float = 0.0
  seed: int = 0
  dtype: DType = jnp.float32

  @property
  def length(self) -> int:
    """The most tokens of a row, a class token included."""
    return self.max_len + (self.pool == "cls")

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the config key, where the settings do not fit."""
    choices = (
      ("attention", ATTENTIONS), ("pool", POOLS), ("positions", POSITIONS),
      ("interaction", INTERACTIONS),
    )  # fmt: skip
    for name, known in choices:
      if getattr(self, name) not in known:
        raise ValueError(
          f"model.{name} is {getattr(self, name)!r}; one of {', '.join(known)}"
        )
    for name in ("layers", "width", "heads", "mlp", "classes", "max_len"):
      if getattr(self, name) < 1:
        raise ValueError(f"model.{name} is {getattr(self, name)}; 1 or more")
    if self.inputs not in (1, 2):
      raise ValueError(f"an example has {self.inputs} rows; 1 or 2")
    for name in ("dropout", "attention_dropout"):
      check_rate(getattr(self, name), f"model.{name}")
    channels = self.qkv or self.width
    if channels % self.heads:
      raise ValueError(
        f"model.heads is {self.heads}, which does not divide the {channels} channels "
        f"of model.{'qkv' if self.qkv else 'width'}"
      )
    for layer in self.attentions():
      layer.check()
      own = layer.inner if isinstance(layer, GatedEncoderAttention) else layer
      if getattr(own, "causal", False) and self.pool != "mean":
        raise ValueError(
          f"model.pool is {self.pool!r}, the first token, which with model.attention "
          f"{self.attention!r} and these options sees no other: set model.pool to mean"
        )

  @nn.nowrap
  def attentions(self) -> tuple[Any, ...]:
    """The attention of every layer, without parameters.

    Raises:
      ValueError: an option that the attention has not.
    """
    kind = ATTENTIONS[self.attention]
    fields = kind.__dataclass_fields__
    given = dict(self.options or {})
    ours = {"heads", "head_width", "dropout", "dtype", "layer", "parent", "name"}
    known = sorted(set(fields) - ours)
    for name in given:
      if name not in known:
        raise ValueError(
          f"attention.{name} is no option of {self.attention}; there are: "
          f"{', '.join(known)}"
        )
    given = typed("attention.", given, {name: fields[name].type for name in given})
    prefix = int(self.pool != "mean")  # tokens at the beginning that stand for the row
    places = {"max_len": self.length, "prefix": prefix, "global_tokens": prefix}
    found = []
    for i in range(self.layers):
      own: dict[str, Any] = {"layer": i, "seed": self.seed} | places | given
      own |= {"dropout": self.attention_dropout, "dtype": self.dtype}
      own = {name: value for name, value in own.items() if name in fields}
      channels = (self.qkv or self.width) // self.heads
      layer = kind(heads=self.heads, head_width=channels, parent=None, **own)
      found.append(layer if self.memory is None else self._gated(layer))
    return tuple(found)

  @nn.nowrap
  def _gated(self, inner: Any) -> GatedEncoderAttention:
    memory = self.memory
    assert memory is not None
    memory = memory.clone(size=memory.size or self.length, parent=None)
    reader = None  # attentions of features read the cache by them too
    if hasattr(inner, "reader"):
      inner.check()
      reader = inner.reader(memory.channels(self.width) // self.heads)
    return GatedEncoderAttention(
      width=self.width,
      heads=self.heads,
      memory=memory,
      inner=inner,
      kernel=reader,
      dropout=self.attention_dropout,
      output_dropout=0.0,  # the block drops what any attention adds
      dtype=self.dtype,
      xavier=True,
      parent=None,
    )

  @nn.nowrap
  def initial_state(self) -> State:
    """Empty caches, one for each layer; () where there are none."""
    self.check()
    if self.memory is None:
      return ()
    return tuple(layer.initial_state() for layer in self.attentions())

  @nn.nowrap
  def gauges(self, params: Any) -> dict[str, Array]:
    """The share of the cache in each head, by "gate/layer/head", where there is one."""
    if self.memory is None:
      return {}
    shares = [
      layer.gauges(params[f"block_{i}"]["attention"])["gate"]
      for i, layer in enumerate(self.attentions())
    ]
    return {
      f"gate/{i}/{h}": share[h]
      for i, share in enumerate(shares)
      for h in range(self.heads)
    }

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B I L"],
    mask: Bool[Array, "B I L"],
    state: State,
    *,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B classes"], State]:
    """Logits of the classes of each example.

    Args:
      tokens: ids below `vocab`; I rows of an example; any number up to `max_len`.
      mask: which tokens are real.
      state: from `initial_state`, or from a former call.
      deterministic: False, in training, turns dropout on, which needs the rng
        "dropout", and lets the rows update the caches.

    Returns:
      Logits in float32; the state afterwards, the same in evaluation.

    Raises:
      ValueError: where the settings do not fit, or rows are too long or too many.
    """
    self.check()
    B, inputs, L = tokens.shape
    if inputs != self.inputs or self.max_len < L:
      raise ValueError(
        f"examples are {inputs} x {L} tokens; the model takes {self.inputs} x "
        f"{self.max_len} at most: change task.length"
      )
    rows, valid = tokens.reshape(-1, L), mask.reshape(-1, L)
    x, state = self._encoded(rows, valid, state, deterministic)
    x = x.reshape(B, inputs, -1)
    linear = lambda size, name, axis: nn.Dense(
      size,
      dtype=self.dtype,
      kernel_init=partitioned(nn.initializers.lecun_normal(), "embed", axis),
      name=name,
    )
    if inputs == 1:
      x = nn.relu(linear(self.mlp, "head", None)(x[:, 0]))
    else:
      a, b = x[:, 0], x[:, 1]
      more = [a * b, a - b] if self.interaction == "nli" else []
      x = nn.relu(linear(self.mlp, "head", None)(jnp.concatenate([a, b, *more], -1)))
      x = nn.relu(linear(self.mlp // 2, "head_2", None)(x))
    return linear(self.classes, "logits", None)(x).astype(jnp.float32), state

  def _encoded(
    self, tokens: Int[Array, "B L"], valid: Mask, state: State, deterministic: bool
  ) -> tuple[Float[Array, "B D"], State]:
    """What the head sees of every row."""
    D = self.width
    table = nn.Embed(
      self.vocab,
      D,
      dtype=self.dtype,
      embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
      name="embed",
    )
    x = table(jnp.where(valid, tokens, 0))  # padding may have any id
    if self.pool == "cls":
      init = partitioned(nn.initializers.zeros, "embed")
      token = self.param("cls", init, (D,), jnp.float32).astype(self.dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, D)), x], axis=1)
      valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    x = x + self._positions(x.shape[1])[None].astype(self.dtype)
    x = Dropout(self.dropout)(x, deterministic=deterministic)
    x = jnp.where(valid[..., None], x, 0)
    segment = Segment(jnp.zeros_like(valid), valid)
    after = []
    for i, attention in enumerate(self.attentions()):
      mlp = MLP(
        hidden=self.mlp,
        dropout=self.dropout,
        hidden_dropout=self.dropout,
        xavier=True,
        dtype=self.dtype,
        parent=None,
      )
      block = EncoderBlock(attention, mlp, self.dropout, self.dtype, name=f"block_{i}")
      own = state[i] if state else None
      x, own = block(x, own, segment, deterministic=deterministic)
      after.append(own)
    x = layer_norm(self.dtype, 1e-6, True, name="norm")(x)
    return self._pooled(x, valid), tuple(after) if state else ()

  def _positions(self, length: int) -> Float[Array, "L D"]:
    """What is added to the embeddings."""
    if self.positions == "none":
      return jnp.zeros((length, self.width), jnp.float32)
    if self.positions == "sinusoidal":
      return jnp.asarray(sinusoids(length, self.width))
    init = partitioned(nn.initializers.normal(0.02), None, "embed")
    shape = (self.length, self.width)
    return self.param("positions", init, shape, jnp.float32)[:length]

  def _pooled(self, x: Hidden, valid: Mask) -> Float[Array, "B D"]:
    if self.pool != "mean":
      return x[:, 0]
    real = valid[..., None]
    total = jnp.where(real, x, 0).sum(axis=1)
    return total / jnp.maximum(real.sum(axis=1), 1).astype(x.dtype)
