"""Attention with synthesised scores: Tay et al., 2020, arXiv:2005.00743."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cached_tx.layers.attentions.checks import check_length
from cached_tx.layers.dropout import Dropout
from cached_tx.layers.exact import kernel_for
from cached_tx.layers.projections import ToHeads, kernel_init
from cached_tx.memory import partitioned
from cached_tx.ops.banded import check_size
from cached_tx.ops.synthesizer import Factors, synthesizer_attention
from cached_tx.types import DType, Heads, Hidden, Segment

MODES = ("dense", "random", "factorized_random")


class SynthesizerAttention(nn.Module):
  """Attention whose scores come from a token alone, or from places; returns heads.

  dense: W_2 relu(W_1 x_i), a number for each place (section 3.2), each head its own.
  random: a learned table, L x L for each head. factorized_random: the product of two
  learned tables, L x k and k x L. Where products of queries and keys are added, the
  scores are S_synthesised + S_product, or with `mixture` their mean by learned weights
  of sum 1 for each head (section 3.3). A row is one document: `segment.starts` is not
  looked at. Time is quadratic in L; memory too in mode random, else linear where scores
  are taken by blocks (`blockwise_attention`).

  Attributes:
    heads: H.
    head_width: K; H K may differ from D.
    max_len: most tokens of a row; shorter ones use the first places.
    mode: dense, random or factorized_random.
    k: of factorized_random.
    dot_product: whether products of queries and keys are added.
    mixture: whether both are weighed; needs `dot_product`.
    bias: whether queries, keys, values and both maps of mode dense have biases.
    dropout: rate on the attention's weights.
    dtype: of the computation. Parameters are float32.
  """

  heads: int
  head_width: int
  max_len: int
  mode: str = "random"
  k: int = 8
  dot_product: bool = True
  mixture: bool = False
  bias: bool = False
  dropout: float = 0.0
  dtype: DType = jnp.float32

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    if self.mode not in MODES:
      raise ValueError(f"attention.mode is {self.mode!r}; one of {', '.join(MODES)}")
    for name in ("k", "max_len"):
      check_size(f"attention.{name}", getattr(self, name))
    if self.mixture and not self.dot_product:
      raise ValueError(
        "attention.mixture weighs synthesised scores and products, but "
        "attention.dot_product is False: set it to True, or mixture to False"
      )

  @nn.compact
  def __call__(
    self, x: Hidden, segment: Segment, *, deterministic: bool = True
  ) -> Heads:
    """Returns B L H K. `x` is 0, and the result means nothing, at padding.

    Raises:
      ValueError: where the settings do not fit, or the row is too long.
    """
    self.check()
    L = x.shape[1]
    check_length(L, self.max_len)
    v = self._project("value", x)
    products: list[Factors] = []
    scores = None
    weights = jnp.ones((self.heads, 2), self.dtype)
    if self.mixture:
      init = partitioned(nn.initializers.zeros, "heads", None)
      logits = self.param("mixture_logits", init, weights.shape, jnp.float32)
      weights = nn.softmax(logits, axis=-1).astype(self.dtype)
    share = weights[None, None, :, :, None]  # 1 1 H 2 1
    if self.dot_product:
      q = self._project("query", x) * self.head_width**-0.5
      products.append((q * share[..., 1, :], self._project("key", x)))
    if self.mode == "random":
      init = partitioned(_xavier(), "heads", None, None)
      shape = self.heads, self.max_len, self.max_len
      scores = self.param("scores", init, shape, jnp.float32)[:, :L, :L]
      scores = scores * weights[:, :1, None]
    else:
      rows, columns = self._dense(x) if self.mode == "dense" else self._factors(L)
      products.append((rows * share[..., 0, :], columns))
    return synthesizer_attention(
      v,
      segment.real,
      products,
      scores,
      drop=Dropout(self.dropout).drop(deterministic),
      kernel=kernel_for("auto", L),
    )

  @nn.nowrap
  def _project(self, name: str, x: Hidden) -> Heads:
    bias = 0.0 if self.bias else None
    own = ToHeads(self.heads, self.head_width, self.dtype, bias, True, name=name)
    return own(x)

  @nn.nowrap
  def _dense(self, x: Hidden) -> Factors:
    """relu(W_1 x) and W_2; a bias of W_2 is a channel more."""
    rows = nn.relu(self._project("hidden", x))
    init = kernel_init(float(self.heads), 2, ("heads", "head_width", None))
    shape = self.heads, self.head_width, self.max_len
    kernel: Any = self.param("places", init, shape, jnp.float32)
    if self.bias:
      init = partitioned(nn.initializers.zeros, "heads", None)
      bias = self.param("places_bias", init, (self.heads, self.max_len), jnp.float32)
      kernel = jnp.concatenate([kernel, bias[:, None]], axis=1)
      rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
    return rows, jnp.moveaxis(kernel[:, :, : x.shape[1]], 2, 0)[None].astype(self.dtype)

  @nn.nowrap
  def _factors(self, L: int) -> Factors:
    """R_1 and R_2 (section 3.2), by place."""
    init = partitioned(_xavier(), "heads", None, None)
    shape = self.heads, self.max_len, self.k
    tables = (self.param(n, init, shape, jnp.float32) for n in ("rows", "columns"))
    rows, columns = (jnp.moveaxis(t[:, :L], 0, 1)[None] for t in tables)
    return rows.astype(self.dtype), columns.astype(self.dtype)


def _xavier() -> Any:
  return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=(0,))
