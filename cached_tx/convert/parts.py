"""What both official codes have in common: how their arrays make our parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cached_tx.convert.weights import Taken
from cached_tx.layers import Adaptive
from cached_tx.models import DecoderLM

NEVER = -1e9  # bias of a token that a model does not know: its probability is 0

Arrays = Mapping[int, np.ndarray]  # by number of table or cluster


class Sizes(NamedTuple):
  """Of a vocabulary, as the weights have it.

  Attributes:
    choices: the model's.
    plain: whether it is one table, not an adaptive vocabulary of one cluster.
    biases: names of the biases of all logits.
    tables: ids of every table, without BOS where the weights have none.
    clusters: ids of every cluster, likewise.
    channels: widths of the rows of every cluster.
    projected: which clusters have a projection.
    bos: 1 where the model has an id more than the weights, the last one; else 0.
  """

  choices: Adaptive
  plain: bool
  biases: list[str]
  tables: list[int]
  clusters: list[int]
  channels: list[int]
  projected: list[bool]
  bos: int

  @property
  def others(self) -> int:
    """How many clusters there are besides the shortlist."""
    return len(self.clusters) - 1

  @property
  def kernels(self) -> list[int]:
    """The clusters whose embeddings have a projection: with one table, one for all."""
    return [i for i in range(len(self.tables)) if self.projected[i]]


def sizes(take: Taken, model: DecoderLM, names: Callable[[int], list[str]]) -> Sizes:
  """The sizes of a model's vocabulary; `names` of the biases of so many clusters."""
  own, D = model.vocabulary or Adaptive(), model.width
  biases = names(len(own.cutoffs) + 1)
  bos = int(sum(map(take.length, biases)) == model.vocab - 1)
  clusters = own.sizes(model.vocab - bos)
  tables = clusters if own.divisor > 1 else [model.vocab - bos]
  return Sizes(
    own,
    model.vocabulary is None,
    biases,
    tables,
    clusters,
    own.channels(D),
    own.projected(D),
    bos,
  )


def head_width(model: DecoderLM) -> int:
  """K."""
  return model.attentions()[0].head_width


def vocabulary(
  of: Sizes,
  tables: Arrays,
  bias: np.ndarray,
  *,
  kernels: Arrays,
  output_tables: Arrays,
  output_kernels: Arrays,
  clusters: np.ndarray | None,
  cluster_bias: np.ndarray | None,
) -> dict[str, Any]:
  """Parameters of a vocabulary; rows and biases get those of BOS where it is new."""
  last = len(of.tables) - 1

  def rows(i: int, table: np.ndarray) -> dict[str, np.ndarray]:
    more = np.zeros((of.bos * (i == last), table.shape[1]), table.dtype)
    return {"embedding": np.concatenate([table, more])}

  bias = np.concatenate([bias, np.full(of.bos, NEVER, bias.dtype)])
  if of.plain:
    return {**rows(0, tables[0]), "output_bias": bias}
  made: dict[str, Any] = {"output_bias": bias}
  made |= {f"tables_{i}": rows(i, table) for i, table in tables.items()}
  made |= {f"output_tables_{i}": rows(i, table) for i, table in output_tables.items()}
  made |= {f"projections_{i}": {"kernel": own} for i, own in kernels.items()}
  made |= {
    f"output_projections_{i}": {"kernel": own} for i, own in output_kernels.items()
  }
  if clusters is not None:
    made |= dict(clusters=clusters, cluster_bias=cluster_bias)
  return made


def attention(
  model: DecoderLM, qkv: np.ndarray, distance: np.ndarray, output: np.ndarray
) -> dict[str, Any]:
  """Projections of a layer, from kernels that lead with their inputs."""
  D, H = model.width, model.heads
  kernels = dict(zip(("query", "key", "value"), np.split(qkv, 3, axis=1), strict=True))
  own = {
    name: {"kernel": kernel.reshape(D, H, -1)}
    for name, kernel in {**kernels, "distance": distance}.items()
  }
  return {**own, "output": {"kernel": output.reshape(H, -1, D)}}


def stacked(blocks: list[dict[str, Any]], period: int) -> dict[str, Any]:
  """The layers, as the periods of the scan."""
  join = lambda own: jax.tree.map(lambda *a: np.stack(a), *own)
  return {f"blocks_{i}": join(blocks[i::period]) for i in range(period)}
