"""Where ids become vectors, and vectors logits: one table, or an adaptive one.

Both have the methods `embed` and `logits`. What `embed` returns is the row of a token
times sqrt(D), so that its numbers are near 1.
"""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from cached_tx.layers.projections import kernel_init
from cached_tx.memory import partitioned
from cached_tx.types import DType, Hidden, Logits, Tokens

Rows = Float[Array, "V E"]


class Adaptive(NamedTuple):
  """The choices of `AdaptiveVocabulary`: keys of a config's model.vocabulary.

  The ids of the vocabulary fall from frequent to rare, and are cut into clusters: the
  shortlist, and one more after each cutoff.

  Attributes:
    cutoffs: the first id of every cluster but the shortlist. (): one cluster.
    divisor: rows of cluster i have width E // divisor ** i. With 1 all clusters are
      parts of one table.
    width: E; 0: D. Rows of another width than D are projected to D.
    tied: the rows that make the logits are those of the embeddings.
    tied_projections: for each cluster, whether its logits are made by the embeddings'
      projection, transposed, or by one of their own. (): all have their own.
    project_same_width: with a divisor, clusters whose rows have width D are projected
      too: both official codes with their usual settings.
  """

  cutoffs: tuple[int, ...] = ()
  divisor: int = 1
  width: int = 0
  tied: bool = True
  tied_projections: tuple[bool, ...] = ()
  project_same_width: bool = False

  def sizes(self, vocab: int) -> list[int]:
    """How many ids every cluster has."""
    ends = [0, *self.cutoffs, vocab]
    return [end - begin for begin, end in itertools.pairwise(ends)]

  def channels(self, width: int) -> list[int]:
    """Widths of the rows of every cluster, in a model of width D."""
    return [
      (self.width or width) // self.divisor**i for i in range(len(self.cutoffs) + 1)
    ]

  def projected(self, width: int) -> list[bool]:
    """Which clusters have a projection."""
    return [own != width or self.project_same_width for own in self.channels(width)]

  def ties(self) -> tuple[bool, ...]:
    """Which clusters' logits go through the projection of the embeddings."""
    return self.tied_projections or (False,) * (len(self.cutoffs) + 1)

  def check(self, vocab: int, width: int) -> None:
    """Raises ValueError, naming the config key, where the choices do not fit."""
    _check_sizes(self, vocab, width)
    projected = self.projected(width)
    clusters = len(projected)
    if self.project_same_width and (
      self.divisor == 1 or width not in self.channels(width)
    ):
      raise ValueError(
        "model.vocabulary.project_same_width is True, but that is for clusters of a "
        f"divisor whose rows have width {width}, and there are none: their widths are "
        f"{self.channels(width)}, the divisor is {self.divisor}"
      )
    if len(self.ties()) != clusters:
      raise ValueError(
        f"model.vocabulary.tied_projections is {self.tied_projections}; it says True "
        f"or False of each of the {clusters} clusters, or is ()"
      )
    for i, (tied, there) in enumerate(zip(self.ties(), projected, strict=True)):
      if tied and not there:
        raise ValueError(
          f"model.vocabulary.tied_projections is {self.tied_projections}, but cluster "
          f"{i} has rows of width {width} and no projection: say False of it"
        )


def _check_sizes(own: Adaptive, vocab: int, width: int) -> None:
  whole = all(isinstance(cutoff, int) for cutoff in own.cutoffs)
  if not whole or any(size < 1 for size in own.sizes(vocab)):
    raise ValueError(
      f"model.vocabulary.cutoffs is {own.cutoffs}; they must increase, from above 0 to "
      f"below the {vocab} ids of the vocabulary (data.tokenizer, data.vocab)"
    )
  if own.width < 0:
    raise ValueError(
      f"model.vocabulary.width is {own.width}; it counts channels, or is 0 (D)"
    )
  if own.divisor < 1 or own.channels(width)[-1] < 1:
    raise ValueError(
      f"model.vocabulary.divisor is {own.divisor}; it must be 1 or more, and leave the "
      f"last of {len(own.cutoffs) + 1} clusters 1 channel of {own.width or width}"
    )
  if own.divisor > 1 and not own.cutoffs:
    raise ValueError(
      f"model.vocabulary.divisor is {own.divisor}, but without "
      "model.vocabulary.cutoffs there is one cluster, which it does not divide"
    )


class Vocabulary(nn.Module):
  """One table: its rows are the embeddings, and their products with x the logits.

  Attributes:
    vocab: V.
    width: D.
    bias: whether logits have one.
    dtype: of the computation. Parameters and logits are float32.
  """

  vocab: int
  width: int
  bias: bool = False
  dtype: DType = jnp.float32

  def setup(self) -> None:
    """Makes the table."""
    self.embedding = _rows(self, self.vocab, self.width)
    if self.bias:
      self.output_bias = _bias(self, "output_bias", self.vocab, "vocab")

  def embed(self, tokens: Tokens) -> Hidden:
    """The embeddings of ids below V."""
    rows = jnp.asarray(self.embedding, self.dtype)
    return jnp.take(rows, _known(tokens, self.vocab), axis=0) * _scale(
      self.width, self.dtype
    )

  def logits(self, x: Hidden) -> Logits:
    """The logits of all ids."""
    bias = self.output_bias if self.bias else None
    return _products(x, jnp.asarray(self.embedding, self.dtype), bias)


class Table(nn.Module):
  """Rows of width E, one for each id."""

  rows: int
  channels: int

  def setup(self) -> None:
    """Makes the rows."""
    self.embedding = _rows(self, self.rows, self.channels)


class Projection(nn.Module):
  """A map from rows of width E to a model's width D."""

  channels: int
  width: int

  def setup(self) -> None:
    """Makes the kernel. It keeps the size of rows whose squares sum to 1."""
    scale = self.channels / self.width
    init = kernel_init(scale, 1, (None, "embed"))
    shape = (self.channels, self.width)
    self.kernel = self.param("kernel", init, shape, jnp.float32)


class AdaptiveVocabulary(nn.Module):
  """Clusters of rows, the rare ones narrower; the softmax of a cluster within another.

  Grave et al., 2017, arXiv:1609.04309 (softmax); Baevski and Auli, 2019,
  arXiv:1809.10853 (embeddings); both as Transformer-XL's code has them. The softmax
  of the shortlist has one more entry for each other cluster, so that

    log p(id) = log p_shortlist(id), or
    log p(id) = log p_shortlist(cluster of id) + log p_cluster(id)

  All of it is computed for every token, since shapes are static: what is saved is
  the parameters and products that the divisor saves, not the clusters that a batch has
  no target in. Losses come out where their targets stand.

  Attributes:
    vocab: V.
    width: D.
    bias: whether logits, those of clusters too, have one.
    dtype: of the computation. Parameters and logits are float32.
    choices: see `Adaptive`.
  """

  vocab: int
  width: int
  bias: bool = False
  dtype: DType = jnp.float32
  choices: Adaptive = Adaptive()

  def setup(self) -> None:
    """Makes the tables."""
    own, D = self.choices, self.width
    sizes, channels = own.sizes(self.vocab), own.channels(D)
    projected = own.projected(D)
    if own.divisor == 1:
      sizes, channels = [self.vocab], channels[:1]
    self.tables = [Table(*of) for of in zip(sizes, channels, strict=True)]
    maps = zip(channels, projected, strict=False)
    self.projections: Any = [Projection(E, D) if there else None for E, there in maps]
    if not own.tied:
      self.output_tables = [Table(*of) for of in zip(sizes, channels, strict=True)]
    pairs = zip(projected, own.ties(), strict=True)
    free = [there and not tied for there, tied in pairs]
    self.output_projections: Any = [
      Projection(E, D) if its else None
      for E, its in zip(own.channels(D), free, strict=True)
    ]
    if own.cutoffs:
      init = partitioned(nn.initializers.zeros, None, "embed")
      shape = (len(own.cutoffs), channels[0])
      self.clusters = self.param("clusters", init, shape, jnp.float32)
    if self.bias:
      self.output_bias = _bias(self, "output_bias", self.vocab, "vocab")
    if self.bias and own.cutoffs:
      self.cluster_bias = _bias(self, "cluster_bias", len(own.cutoffs), None)

  def embed(self, tokens: Tokens) -> Hidden:
    """The embeddings of ids below V."""
    tokens = _known(tokens, self.vocab)
    total, begin = jnp.zeros((*tokens.shape, self.width), self.dtype), 0
    for table, projection in zip(self.tables, self.projections, strict=True):
      own, last = tokens - begin, begin + table.rows == self.vocab
      # The last table gets the ids beyond it too: NaN, and no silence.
      inside = (own >= 0) & ((own < table.rows) | last)
      rows = jnp.asarray(table.embedding, self.dtype)
      x = jnp.take(rows, jnp.where(inside, own, 0), axis=0)
      if projection is not None:
        x = jnp.einsum("ble,ed->bld", x, jnp.asarray(projection.kernel, self.dtype))
      x = jnp.where(inside[..., None], x, 0)
      total = total + x
      begin += table.rows
    return total * _scale(self.width, self.dtype)

  def logits(self, x: Hidden) -> Logits:
    """Logits of all ids; with more than one cluster they are log-probabilities."""
    ends = [0, *self.choices.cutoffs, self.vocab]
    parts = [self._cluster(x, i, *ends[i : i + 2]) for i in range(len(ends) - 1)]
    if not self.choices.cutoffs:
      return parts[0]
    first, size = jax.nn.log_softmax(parts[0]), self.choices.cutoffs[0]
    found = [first[..., :size]]
    for i, part in enumerate(parts[1:]):
      found.append(jax.nn.log_softmax(part) + first[..., size + i, None])
    return jnp.concatenate(found, axis=-1)

  def _cluster(self, x: Hidden, i: int, begin: int, end: int) -> Float[Array, "B L W"]:
    """Logits of a cluster's ids; of the first one's, and of the other clusters."""
    own, first = self.choices, i == 0 and bool(self.choices.cutoffs)
    kernel = self._output_projection(i)
    if kernel is not None:
      x = jnp.einsum("bld,ed->ble", x, jnp.asarray(kernel, self.dtype))
    tables = self.tables if own.tied else self.output_tables
    rows = tables[0].embedding[begin:end]
    if own.divisor > 1:
      rows = tables[i].embedding
    bias = self.output_bias[begin:end] if self.bias else None
    if first:
      rows = jnp.concatenate([rows, self.clusters])
    if first and bias is not None:
      bias = jnp.concatenate([bias, self.cluster_bias])
    return _products(x, jnp.asarray(rows, self.dtype), bias)

  def _output_projection(self, i: int) -> ArrayLike | None:
    own = self.choices
    if not own.projected(self.width)[i]:
      return None
    if not own.ties()[i]:
      return self.output_projections[i].kernel
    return self.projections[0 if own.divisor == 1 else i].kernel


def vocabulary_for(
  choices: Adaptive | None,
  vocab: int,
  width: int,
  bias: bool = False,
  dtype: DType = jnp.float32,
) -> Vocabulary | AdaptiveVocabulary:
  """The vocabulary of these choices; the rest as of `Vocabulary`, in its order."""
  if choices is None:
    return Vocabulary(vocab, width, bias, dtype)
  return AdaptiveVocabulary(vocab, width, bias, dtype, choices)


def _known(tokens: Tokens, vocab: int) -> Tokens:
  """The ids; those below 0, which would count from the end, as an unknown one."""
  return jnp.where(tokens < 0, vocab, tokens)


def _rows(module: nn.Module, count: int, channels: int) -> Any:
  """The parameter of a table, whose rows' squares sum to 1."""
  init = partitioned(nn.initializers.normal(channels**-0.5), "vocab", "embed")
  return module.param("embedding", init, (count, channels), jnp.float32)


def _bias(module: nn.Module, name: str, size: int, axis: str | None) -> Any:
  """A parameter that is added to logits."""
  init = partitioned(nn.initializers.zeros, axis)
  return module.param(name, init, (size,), jnp.float32)


def _scale(width: int, dtype: DType) -> Array:
  return jnp.asarray(width**0.5, dtype)


def _products(x: Hidden, rows: Rows, bias: ArrayLike | None) -> Logits:
  """Products of x and rows, in float32 at least, and their biases."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum("ble,ve->blv", x, rows, preferred_element_type=wide)
  return logits if bias is None else logits + jnp.asarray(bias, wide)[None, None]
