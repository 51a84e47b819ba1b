"""A decoder language model with explicit memory."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cached_tx.layers import (
  ACTIVATIONS,
  ANALYSIS,
  MLP,
  NORMS,
  Adaptive,
  Block,
  Dropout,
  MemoryAttention,
  attention_for,
  check_rate,
  has_option,
  is_stream,
  layer_norm,
  vocabulary_for,
)
from cached_tx.memory import MemoryModule, partitioned
from cached_tx.types import DType, Hidden, Logits, Losses, Segment, State, Tokens

REMAT = ("none", "dots", "full")
SLOTS_ONLY = ("head_width", "attention_dropout", "tied_biases")


def last_step(steps: int) -> int:
  """The training step, from 0, that parameters after `steps` of them are read with.

  The last of them, or 0 before the first: what a memory drew for it is what the
  parameters were trained with last, so that reading a checkpoint draws nothing new.
  """
  return max(steps - 1, 0)


class Period(nn.Module):
  """The blocks of one period of the pattern, one after the other."""

  blocks: tuple[Block, ...]
  deterministic: bool

  def __call__(
    self, x: Hidden, state: tuple[State, ...], draw: tuple[Any, ...], segment: Segment
  ) -> tuple[Hidden, tuple[tuple[State, ...], Losses]]:
    """Returns the hidden state, and the states and the summed losses of the blocks."""
    after: list[State] = []
    total: Losses = {}
    for block, own, constant in zip(self.blocks, state, draw, strict=True):
      x, own, losses = block(
        x, own, segment, draw=constant, deterministic=self.deterministic
      )
      after.append(own)
      for key, loss in losses.items():
        total[key] = total[key] + loss if key in total else loss
    return x, (tuple(after), total)


class Stack(nn.Module):
  """All layers: the period, scanned G times. Parameters and states lead with G."""

  blocks: tuple[Block, ...]
  periods: int
  unroll: int
  remat: str
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: Hidden, state: tuple[State, ...], draws: tuple[Any, ...], segment: Segment
  ) -> tuple[Hidden, tuple[State, ...], Losses]:
    """Arguments and results as of `Block`, for all layers at once."""
    period = Period
    if self.remat != "none":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      policy = policy if self.remat == "dots" else None
      period = nn.remat(Period, prevent_cse=False, policy=policy)
    scanned = nn.scan(
      period,
      variable_axes={"params": 0, ANALYSIS: 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, 0, nn.broadcast),
      out_axes=0,
      length=self.periods,
      unroll=min(self.unroll, self.periods),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    layers = scanned(self.blocks, self.deterministic, name="layers")
    x, (state, losses) = layers(x, state, draws, segment)
    return x, state, {name: loss.sum(axis=0) for name, loss in losses.items()}


class DecoderLM(nn.Module):
  """Predicts the next token from the document so far.

  The layers repeat `memories` as a period: layers 0, P, 2P, ... hold the first kind.
  One compiled period serves all, scanned over the G = layers / P periods; states and
  parameters are stacked on a leading axis G.

  Attributes:
    vocab: V.
    layers: N; a multiple of the number of memories.
    width: D.
    heads: H.
    mlp: F.
    segment: C, tokens between two updates of a memory that has a clock.
    memories: one kind per layer of the period.
    tbptt: the gradient is cut at every tbptt-th segment boundary of a call, counted
      from its first segment, where a call brings whole segments. A stream is not cut.
    positions: rotary, relative or none, for all kinds alike.
    dropout: rate, on attention weights and on the output of every branch.
    dtype: of the computation. Parameters and logits are float32.
    remat: what the backward pass computes anew: none; dots (all but matrix products);
      full (whole periods).
    activation: of the MLPs: gelu, relu or relu2.
    unroll: periods per iteration of the scan over layers: more to compile, and
      fewer copies of what is stacked.
    norm: where norms stand in a block, as of `Block`; pre has one more before the
      logits, post and pre_raw have none, as Transformer-XL's code.
    norm_bias: whether norms have a bias.
    norm_epsilon: added to a norm's variance: 1e-12 in Transformer-XL's TensorFlow code.
    output_bias: whether logits have a bias.
    head_width: K; 0: D / H.
    attention_dropout: rate on attention weights; None: that of `dropout`.
    tied_biases: one pair of biases u and v (relative positions) for all layers, as in
      Transformer-XL's PyTorch code, instead of one for each.
    attention: auto, dense or blocks, as of `SlotAttention`: how scores are held.
    vocabulary: an adaptive one, for ids that fall from frequent to rare; where it has
      cutoffs, logits are log-probabilities. None: one table, which embeddings and
      logits share.
    step: the training step, from 0, whose random constants a call has that names none;
      `after` sets it.
  """

  vocab: int
  layers: int
  width: int
  heads: int
  mlp: int
  segment: int
  memories: tuple[MemoryModule, ...]
  tbptt: int = 1
  positions: str = "rotary"
  dropout: float = 0.0
  dtype: DType = jnp.float32
  remat: str = "none"
  activation: str = "gelu"
  unroll: int = 1
  norm: str = "pre"
  norm_bias: bool = False
  norm_epsilon: float = 1e-5
  output_bias: bool = False
  head_width: int = 0
  attention_dropout: float | None = None
  tied_biases: bool = False
  attention: str = "auto"
  vocabulary: Adaptive | None = None
  step: int = 0

  @nn.nowrap
  def after(self, steps: int) -> "DecoderLM":
    """This model, for parameters that `steps` training steps made, or their average.

    Where a memory redraws, it has the random constants of step `last_step(steps)`;
    otherwise it is the same object, for which everything is compiled already.
    """
    if not any(memory.redraw for memory in self.memories):
      return self
    return self.clone(step=last_step(steps))

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the config key, where the settings do not fit."""
    if self.layers < 1 or self.layers % len(self.memories):
      raise ValueError(
        f"model.layers is {self.layers}; it must be a multiple of the "
        f"{len(self.memories)} memories of model.pattern"
      )
    if self.remat not in REMAT:
      raise ValueError(f"model.remat is {self.remat!r}; one of {', '.join(REMAT)}")
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"model.activation is {self.activation!r}; one of {', '.join(ACTIVATIONS)}"
      )
    if self.unroll < 1:
      raise ValueError(f"model.unroll is {self.unroll}; it counts periods: 1 or more")
    if self.norm not in NORMS:
      raise ValueError(f"model.norm is {self.norm!r}; one of {', '.join(NORMS)}")
    if not self.norm_epsilon > 0:
      raise ValueError(
        f"model.norm_epsilon is {self.norm_epsilon}; it is added to a variance: above 0"
      )
    if self.vocabulary is not None:
      self.vocabulary.check(self.vocab, self.width)
    for name in ("dropout", "attention_dropout"):
      check_rate(getattr(self, name) or 0.0, f"model.{name}")
    taken = any(has_option(memory, "attention") for memory in self.memories)
    if self.attention != "auto" and not taken:
      raise ValueError(
        f"model.attention is {self.attention!r}, an option of layers with exact "
        "attention, of which there are none: leave it out, or change memory.kind"
      )
    for memory in self.memories:
      self._check_reader(memory)
      if self.tbptt < memory.min_tbptt:
        raise ValueError(
          f"tbptt is {self.tbptt}, but {type(memory).__name__} needs "
          f"{memory.min_tbptt} or more segments: {memory.min_tbptt_reason}; "
          "change tbptt and segments"
        )
    self.blocks()

  @nn.nowrap
  def _check_reader(self, memory: MemoryModule) -> None:
    """Options of attention to slots are refused where a layer is of another kind."""
    if memory.reader == "slots":
      return
    fields = self.__dataclass_fields__
    given = [n for n in SLOTS_ONLY if getattr(self, n) != fields[n].default]
    given += ["norm"] * (self.norm == "pre_raw")
    if given:
      raise ValueError(
        f"model.{given[0]} is {getattr(self, given[0])!r}, an option of layers that "
        f"attend to slots, but {type(memory).__name__} has another: leave it out, or "
        "change memory.kind"
      )

  @nn.nowrap
  def _norm(self, **options: Any) -> nn.LayerNorm:
    return layer_norm(self.dtype, self.norm_epsilon, self.norm_bias, **options)

  @nn.nowrap
  def _slot_options(self, memory: MemoryModule) -> dict[str, Any]:
    if not has_option(memory, "attention"):
      return {}
    if memory.reader != "slots":
      return {"attention": self.attention}
    return {
      "channels": self.head_width,
      "weight_dropout": self.attention_dropout,
      "tied": self.tied_biases,
      "attention": self.attention,
      "norm": self._norm(parent=None) if self.norm == "pre_raw" else None,
    }

  @nn.nowrap
  def blocks(self) -> tuple[Block, ...]:
    """The blocks of one period, without parameters."""
    # Keeps the residual stream's variance near 1, where no norm does after each sum.
    scale = 1.0 if self.norm == "post" else 1 / (2 * self.layers)
    period = []
    for memory in self.memories:
      attention = attention_for(
        memory,
        width=self.width,
        heads=self.heads,
        segment=self.segment,
        positions=self.positions,
        dropout=self.dropout,
        output_scale=scale,
        dtype=self.dtype,
        parent=None,
        **self._slot_options(memory),
      )
      mlp = MLP(
        hidden=self.mlp,
        activation=self.activation,
        output_scale=scale,
        dropout=self.dropout,
        dtype=self.dtype,
        parent=None,
      )
      norms = (self.norm, self.norm_bias, self.norm_epsilon)
      period.append(Block(attention, mlp, self.dtype, *norms, parent=None))
    return tuple(period)

  @nn.nowrap
  def attentions(self) -> tuple[MemoryAttention, ...]:
    """The attention layers of one period, without parameters."""
    return tuple(block.attention for block in self.blocks())

  @nn.nowrap
  def gauges(self, params: Any) -> dict[str, Array]:
    """What the layers' parameters say at a glance, one scalar per head.

    Args:
      params: of the model.

    Returns:
      Scalars by "name/layer/head", such as gate/0/3: the share, sigmoid(lambda), of
      the gated cache in head 3 of layer 0. Layers without gauges have none.
    """
    found: dict[str, Array] = {}
    for i, attention in enumerate(self.attentions()):
      own = params["stack"][f"blocks_{i}"]["attention"]
      for name, values in attention.gauges(own).items():  # G H
        for g in range(self.periods):
          layer = g * len(self.memories) + i
          for h in range(values.shape[1]):
            found[f"{name}/{layer}/{h}"] = values[g, h]
    return found

  @property
  def periods(self) -> int:
    """G."""
    return self.layers // len(self.memories)

  @nn.nowrap
  def initial_state(self, batch: int) -> State:
    """The empty memory of `batch` rows, for whole segments.

    Returns:
      A tuple of one state per layer of the period; leaves lead with G, then B.
    """
    self.check()
    return tuple(self._stacked(a.initial_state(batch)) for a in self.attentions())

  @nn.nowrap
  def open_stream(self, state: State, batch: int) -> State:
    """The state that takes any number of tokens, from one at a segment's boundary."""
    return tuple(
      jax.vmap(lambda s, a=a: a.open_stream(s, batch), axis_size=self.periods)(own)
      for a, own in zip(self.attentions(), state, strict=True)
    )

  @nn.nowrap
  def _stacked(self, state: State) -> State:
    return jax.tree.map(lambda a: jnp.stack([a] * self.periods), state)

  @nn.nowrap
  def _draws(self, step: Array | int) -> tuple[Any, ...]:
    """What layers get besides parameters, stacked: random constants, shared biases."""
    if self.tied_biases:
      shape = (self.heads, self.attentions()[0].head_width)
      init = partitioned(nn.initializers.zeros, "heads", "head_width")
      pair = [
        self.param(name, init, shape, jnp.float32)
        for name in ("content_bias", "distance_bias")
      ]
      stacked = tuple(jnp.broadcast_to(b[None], (self.periods, *shape)) for b in pair)
      return (stacked,) * len(self.memories)
    period = len(self.memories)
    return tuple(
      jax.vmap(lambda n, a=a: a.draw(n, step))(jnp.arange(i, self.layers, period))
      for i, a in enumerate(self.attentions())
    )

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    state: State,
    segment: Segment,
    *,
    deterministic: bool = True,
    step: Int[Array, ""] | int | None = None,
  ) -> tuple[Logits, State, Losses]:
    """Logits of the token after each token.

    Args:
      tokens: ids below `vocab`.
      state: from `initial_state` (L is a multiple of `segment`, no padding), from
        `open_stream` (any L, padding anywhere), or from a former call.
      segment: document starts and padding.
      deterministic: False turns dropout on; needs the rng "dropout".
      step: the training step, from 0, whose random constants are used; it may be
        traced. None: the model's own. In training, the steps done before; afterwards
        as of `last_step`. Memories say what a step changes (`memory.redraw`).

    Returns:
      Logits in float32; the state afterwards, of the type it had; auxiliary losses,
      summed over layers and over the segments that each row finished.

    Raises:
      ValueError: where the settings do not fit, or the tokens do not fit the state.
    """
    self.check()
    options = (self.vocab, self.width, self.output_bias, self.dtype)
    words = vocabulary_for(self.vocabulary, *options)
    nn.share_scope(self, words)  # its parameters stand among the model's own
    if segment.valid is not None:
      tokens = jnp.where(segment.valid, tokens, 0)  # padding may have any id
    x = Dropout(self.dropout)(words.embed(tokens), deterministic=deterministic)
    stack = Stack(
      blocks=self.blocks(),
      periods=self.periods,
      unroll=self.unroll,
      remat=self.remat,
      deterministic=deterministic,
      name="stack",
    )
    draws = self._draws(self.step if step is None else step)
    whole = tokens.shape[1] % self.segment == 0 and segment.valid is None
    clocked = any(memory.clocked for memory in self.memories)
    if not is_stream(state) and (whole or (clocked and tokens.shape[1] > self.segment)):
      x, state, losses = self._segments(stack, x, state, draws, segment)
    else:
      x, state, losses = stack(x, state, draws, segment)
    if self.norm == "pre":
      x = self._norm(name="norm")(x)
    return words.logits(x), state, losses

  def _segments(
    self, stack: Stack, x: Hidden, state: State, draws: Any, segment: Segment
  ) -> tuple[Hidden, State, Losses]:
    """Scans the segments of a call, the state being the carry."""
    B, L, D = x.shape
    C, n = self.segment, L // self.segment
    if L % C or segment.valid is not None:
      padded = " and a mask of padding" if segment.valid is not None else ""
      raise ValueError(
        f"a call brings {L} tokens{padded}; a state at a segment's boundary takes "
        f"multiples of segment = {C} without padding: pass `open_stream(state)`"
      )

    def one(stack, state, now):
      x, starts, number = now
      if self.tbptt == 1:  # known before it runs: nothing is computed in vain
        state = jax.lax.stop_gradient(state)
      else:
        cut = number % self.tbptt == 0
        still = lambda a: jnp.where(cut, jax.lax.stop_gradient(a), a)
        state = jax.tree.map(still, state)
      x, state, losses = stack(x, state, draws, Segment(starts))
      return state, (x, losses)

    scan = nn.scan(
      one,
      variable_axes={ANALYSIS: 0},
      variable_broadcast="params",
      split_rngs={"params": False, "dropout": True},
    )
    cuts = x.reshape(B, n, C, D).swapaxes(0, 1)
    starts = segment.starts.reshape(B, n, C).swapaxes(0, 1)
    state, (x, losses) = scan(stack, state, (cuts, starts, jnp.arange(n)))
    x = x.swapaxes(0, 1).reshape(B, L, D)
    return x, state, {name: loss.sum(axis=0) for name, loss in losses.items()}
