"""A text in lanes as published evaluations of Transformer-XL cut it."""

import numpy as np

from cached_tx.data.streams import Batch, Lanes, Tokens, host_rows


class OrderedBatches(Lanes):
  """A split as the `LMOrderedIterator` of Transformer-XL's code reads it.

  BOS tokens are left out and no document begins: all is one text, of N tokens. It is
  cut into B lanes of N // B tokens, one per row, and the tokens left over at its end
  are dropped. A lane predicts all of its tokens but the first. Where the last segment
  is shorter, as most are, it is padded with BOS tokens (starts True, weight 0).

  `EvaluationBatches` differs: documents begin anew, and every token is predicted.

  Attributes:
    targets: number of tokens predicted: the sum of all weights over all hosts.
  """

  def __init__(
    self, tokens: Tokens, *, rows: int, length: int, shard: int = 0, shards: int = 1
  ):
    """Takes what `EvaluationBatches` takes.

    Raises:
      ValueError: no rows for this host, a length below 1, or a text so short that a
        lane has nothing to predict.
    """
    if length < 1:
      raise ValueError(f"length={length}: a step reads at least 1 token per row")
    self.rows = host_rows(rows, shard, shards)
    text = tokens.flat[tokens.flat != tokens.bos]
    lane = len(text) // rows
    if lane < 2:
      raise ValueError(
        f"rows={rows} lanes of a text of {len(text)} tokens have {lane} each, but a "
        "lane predicts all but its first: take fewer rows (eval.batch)"
      )
    self._lanes = text[: lane * rows].reshape(rows, lane)[list(self.rows)]
    self._length, self._width, self._bos = length, lane - 1, tokens.bos
    self.targets = rows * (lane - 1)

  def _cut(self, first: int) -> Batch:
    piece = self._lanes[:, first : first + self._length + 1]
    count = piece.shape[1] - 1
    tokens = np.full((len(self.rows), self._length), self._bos, np.int32)
    targets = tokens.copy()
    tokens[:, :count], targets[:, :count] = piece[:, :-1], piece[:, 1:]
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, :count] = 1
    return Batch(tokens, targets, weights, tokens == self._bos)
