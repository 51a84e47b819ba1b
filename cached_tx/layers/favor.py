"""Attention to all tokens in linear time: FAVOR+ for encoders, and across sequences.

Choromanski et al., 2021, arXiv:2009.14794, without causal masks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cached_tx.layers.projections import ToHeads
from cached_tx.ops.choices import check_rows
from cached_tx.ops.documents import document_ids, positions_in_document
from cached_tx.ops.favor import favor_bidirectional
from cached_tx.ops.features import FEATURES
from cached_tx.ops.positions import rotate
from cached_tx.ops.projections import Rows, constant, project, seeded
from cached_tx.types import DType, Heads, Hidden, Mask, Segment

POSITIONS = ("none", "rotary")


class _Favor(nn.Module):
  """What both layers have: options, and random rows.

  The rows are a function of `projection`, `seed`, `layer`, `features` and the width of
  a head: neither parameters nor state. They are drawn when a program is traced (where
  several processes run it: in the program, at every call); `rows=` gives others. Layers
  that `nn.scan` makes of one have its number, hence the same rows, unless they are
  given each its own.
  """

  width: int
  heads: int
  features: int = 128
  kernel: str = "positive"
  projection: str = "orthogonal"
  seed: int = 0
  layer: int = 0
  bias: bool = False
  dtype: DType = jnp.float32

  @property
  def head_width(self) -> int:
    """K."""
    return self.width // self.heads

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    if self.width % self.heads:
      raise ValueError(
        f"heads is {self.heads}, which does not divide width {self.width}"
      )
    options = self.kernel, self.projection, self.features
    check_rows(*options, self.head_width, type(self).features)

  @nn.nowrap
  def draw(self) -> Rows | None:
    """The rows, float32; None where features are made without."""
    self.check()
    if self.projection == "none":
      return None
    options = self.features, self.head_width

    def make() -> Rows:
      key = jax.random.fold_in(seeded(self.seed), self.layer)
      return project(self.projection, key, *options)

    return constant(make)

  @nn.nowrap
  def rows_or(self, given: Rows | None) -> Rows | None:
    """The rows that a caller gave, or else the layer's own."""
    if given is None:
      return self.draw()
    self.check()
    if self.projection == "none":
      raise ValueError("rows are given, but projection is 'none': choose one, or none")
    if given.shape != (self.features, self.head_width):
      raise ValueError(
        f"rows are {given.shape[0]} x {given.shape[1]}, but features is "
        f"{self.features} and a head is {self.head_width} wide"
      )
    return given

  @nn.nowrap
  def part(self, name: str) -> ToHeads:
    """A map of the input to heads."""
    bias = 0.0 if self.bias else None
    return ToHeads(self.heads, self.head_width, self.dtype, bias, name=name)


class FavorEncoderAttention(_Favor):
  """Every real token attends to all real tokens of its document; returns heads.

  Time and memory are linear in the number of tokens. There are no weights to drop.

  Attributes:
    width: D.
    heads: H; divides D.
    features: M, the rows of the projection.
    kernel: what the features stand for: positive, hyperbolic or trigonometric features
      of the softmax kernel; relu, elu1 or squares as kernels of their own.
    projection: orthogonal, iid, regularised or hadamard rows; none, for kernels of
      their own alone, where `features`, which must then be left at its default, and
      `seed` mean nothing.
    seed: of the rows, with `layer`.
    layer: number of the layer, so that layers of one seed have rows of their own.
    bias: whether queries, keys and values have biases.
    dtype: of the computation. Parameters are float32; features and sums at least.
    positions: none, or rotary, turned before the feature map; they count real tokens
      only.
    packed: whether a row may hold several documents, which do not attend each other.
      False says that every row is one document and takes less time; starts within a
      row are then not looked at.
  """

  positions: str = "none"
  packed: bool = True

  @nn.nowrap
  def check(self) -> None:
    """Raises ValueError, naming the option, where the settings do not fit."""
    super().check()
    if self.positions not in POSITIONS:
      raise ValueError(
        f"positions is {self.positions!r}; one of {', '.join(POSITIONS)}"
      )
    if self.positions == "rotary" and self.head_width % 2:
      raise ValueError(
        "positions is 'rotary', which turns pairs of channels, but a head has "
        f"{self.head_width}: change width, heads or positions"
      )

  @nn.compact
  def __call__(
    self,
    x: Hidden,
    segment: Segment,
    *,
    rows: Rows | None = None,
    deterministic: bool = True,
  ) -> Heads:
    """Attends.

    Args:
      x: any float dtype.
      segment: document starts and padding of the tokens.
      rows: to be used instead of the layer's own, M x K. No gradient flows to them.
      deterministic: means nothing here; other attentions have dropout.

    Returns:
      Heads, 0 at padding, to be joined by an output projection.

    Raises:
      ValueError: where the settings or the rows do not fit.
    """
    del deterministic
    rows = self.rows_or(rows)
    real = segment.real
    if segment.valid is not None:
      x = jnp.where(real[..., None], x, 0)
    q, k, v = (self.part(name)(x) for name in ("query", "key", "value"))
    if self.positions == "rotary":
      # Features change with the angle, even if q and k turn alike: by document.
      starts = segment.starts & self.packed
      before = jnp.zeros(x.shape[:1], jnp.int32)
      place, _ = positions_in_document(Segment(starts, segment.valid), before)
      q, k = rotate(q, place), rotate(k, place)
    scale = self.head_width**-0.25
    return favor_bidirectional(
      q * scale,
      k * scale,
      v,
      rows,
      queries=segment.valid,
      keys=segment.valid,
      documents=document_ids(segment.starts & real) if self.packed else None,
      features=FEATURES[self.kernel],
    )


class FavorCrossAttention(_Favor):
  """Every real token attends to all tokens of another sequence; returns heads.

  Time and memory are linear in both lengths. There are no weights to drop.

  Attributes: those of `FavorEncoderAttention`, but for `positions` and `packed`.
  """

  @nn.compact
  def __call__(
    self,
    x: Hidden,
    source: Float[Array, "B S E"],
    valid: Mask | None = None,
    shown: Bool[Array, "B S"] | None = None,
    *,
    rows: Rows | None = None,
    deterministic: bool = True,
  ) -> Heads:
    """Attends.

    Args:
      x: what the queries are made of, any float dtype.
      source: what keys and values are made of, any float dtype, of any width.
      valid: which tokens of `x` are real. None: all.
      shown: which tokens of `source` are. None: all.
      rows, deterministic: as of `FavorEncoderAttention`.

    Returns:
      Heads, 0 at padding and in rows whose source has no real token, to be joined by
      an output projection.

    Raises:
      ValueError: where the settings or the rows do not fit.
    """
    del deterministic
    rows = self.rows_or(rows)
    if valid is not None:
      x = jnp.where(valid[..., None], x, 0)
    if shown is not None:
      source = jnp.where(shown[..., None], source, 0)
    q, k, v = self.part("query")(x), *(self.part(n)(source) for n in ("key", "value"))
    scale = self.head_width**-0.25
    return favor_bidirectional(
      q * scale,
      k * scale,
      v,
      rows,
      queries=valid,
      keys=shown,
      features=FEATURES[self.kernel],
    )
