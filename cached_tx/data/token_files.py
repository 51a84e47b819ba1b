"""Tokens kept in a cache folder and mapped into memory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cached_tx.data.sources.files import settle
from cached_tx.data.streams import Tokens, begins, encode
from cached_tx.data.tokenizers import Tokenizer


def tokenize(
  folder: Path, documents: Sequence[bytes], tokenizer: Tokenizer, dtype: np.dtype
) -> Tokens:
  """Returns the tokens of all documents, mapped from `folder`, written at first use.

  Memory holds one document at a time. The folder appears with one rename, so that
  processes which write at the same time, or die, leave no half of it.
  """
  if not folder.is_dir():
    _write(folder, documents, tokenizer, dtype)
  flat = np.memmap(folder / "tokens.bin", dtype, "r")
  return Tokens(flat, np.load(folder / "begins.npy"), tokenizer.bos)


def _write(
  folder: Path, documents: Sequence[bytes], tokenizer: Tokenizer, dtype: np.dtype
):
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
    made = Path(part, "made")
    made.mkdir()
    lengths = []
    with open(made / "tokens.bin", "wb") as f:
      for document in documents:
        ids = encode(document, tokenizer, dtype)
        f.write(ids.tobytes())
        lengths.append(len(ids))
    np.save(made / "begins.npy", begins(lengths))
    settle(made, folder)
