"""Tokens kept in a cache folder and mapped into memory."""

import tempfile
from pathlib import Path

import numpy as np

from cached_tx.data.sources.base import Documents
from cached_tx.data.sources.files import settle
from cached_tx.data.streams import Tokens, begins, encode
from cached_tx.data.tokenizers import Tokenizer


def tokenize(documents: Documents, tokenizer: Tokenizer, dtype) -> Tokens:
  """Returns the tokens of all documents, mapped; writes them at the first call.

  Memory holds one document at a time. The folder appears with one rename, so that
  processes which write at the same time, or die, leave no half of it.
  """
  folder = documents.cache / f"{documents.label} {tokenizer.identity}".replace(" ", "_")
  if not folder.is_dir():
    _write(folder, documents, tokenizer, dtype)
  flat = np.memmap(folder / "tokens.bin", dtype, "r")
  return Tokens(flat, np.load(folder / "begins.npy"), tokenizer.bos)


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer, dtype):
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
