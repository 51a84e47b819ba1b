"""Sub-words of a SentencePiece model file."""

import hashlib
from pathlib import Path

import numpy as np

from cached_tx.data.tokenizers import Encoded, Ids


class SentencePiece:
  """The pieces of a model file, and BOS.

  BOS is the model's own, or one extra id after the pieces where it has none. What
  decode gives back is the model's normalised text: exact only for a model that was
  trained without normalisation (`identity`, no removal of whitespace) and with byte
  fallback. Bits per byte and perplexity per word divide by the bytes and words of
  the original.
  """

  name = "sentencepiece"

  def __init__(self, path: str):
    """Reads the model file at `path`.

    Raises:
      ValueError: `path` is empty.
      FileNotFoundError: no such file.
      ImportError: the package sentencepiece is not installed.
    """
    if not path:
      raise ValueError(
        "data.vocab='': data.tokenizer='sentencepiece' needs its model file"
      )
    if not Path(path).is_file():
      raise FileNotFoundError(f"data.vocab={path!r}: no such SentencePiece model file")
    try:
      import sentencepiece
    except ImportError as error:
      raise ImportError(
        "data.tokenizer='sentencepiece' needs: pip install 'cached_tx[sentencepiece]'"
      ) from error
    model = Path(path).read_bytes()
    self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = self._model.get_piece_size()
    own = self._model.bos_id()
    self.bos = own if own >= 0 else pieces
    self.vocab = pieces + (own < 0)
    self.identity = f"sentencepiece-{hashlib.sha256(model).hexdigest()[:16]}"

  def encode(self, text: bytes) -> Encoded:
    """Returns the ids of `text` (UTF-8; other bytes become U+FFFD), without BOS."""
    return np.array(self._model.encode(text.decode(errors="replace")), np.int32)

  def decode(self, ids: Ids) -> bytes:
    """Returns the text of `ids` as UTF-8; BOS is left out."""
    return self._model.decode([int(i) for i in ids if i != self.bos]).encode()
