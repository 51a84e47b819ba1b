"""Whether a run continues on the data it began with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cached_tx.data import Tokens
from cached_tx.tables import counted

LARGEST = 2**28  # bytes of tokens that are hashed whole
_BLOCKS, _BLOCK = 1024, 4096  # of larger ones: how many blocks, of so many bytes


def identity(tokens: Tokens) -> dict[str, Any]:
  """What a checkpoint keeps of the training data, as JSON data.

  Returns:
    The numbers of tokens and documents; "sha256" of where documents begin and of the
    tokens, and "hashed": "all", or above 256 MiB "sample": 1,024 blocks of 4 KiB,
    spread evenly over the tokens, the first and the last included.
  """
  raw = tokens.flat.view(np.uint8)
  digest = hashlib.sha256(np.ascontiguousarray(tokens.begins).data)
  whole = raw.nbytes <= LARGEST
  if whole:
    digest.update(raw.data)
  else:
    for begin in np.linspace(0, raw.nbytes - _BLOCK, _BLOCKS).astype(np.int64):
      digest.update(raw[begin : begin + _BLOCK].data)
  return {
    "tokens": len(tokens.flat),
    "documents": len(tokens.begins),
    "sha256": digest.hexdigest(),
    "hashed": "all" if whole else "sample",
  }


def check_data(stored: Mapping[str, Any] | None, given: Mapping[str, Any]) -> None:
  """Refuses to continue a run on other data.

  Args:
    stored: `identity` of the data of the run; None where a checkpoint has none.
    given: of the data there is now.

  Raises:
    ValueError: they differ.
  """
  if stored is None or dict(stored) == dict(given):
    return

  def said(data: Mapping[str, Any]) -> str:
    tokens = counted(data["tokens"], "token")
    documents = counted(data["documents"], "document")
    return f"{tokens} in {documents}, SHA-256 {data['sha256'][:16]}"

  raise ValueError(
    f"the training data is not what this run began with: it was {said(stored)}; now it "
    f"is {said(given)}. Set data.path (of the Long Range Arena, task.path) to the old "
    "data, or start a new run with another --workdir"
  )
