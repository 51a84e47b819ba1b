"""A state in one file, bound to the model that made it.

The file has the safetensors format: any reader of it sees the arrays, by path. Its
metadata has two entries. "sha256" is that of the whole file, computed with 64 zeros
in its own place. "cached_tx" is JSON:

    format    1
    tree      the structure: types of tuples, names of their fields
    leaves    of every array: dtype, shape, SHA-256 of its bytes
    weights   of every parameter: dtype, shape, fingerprint
    config    the config that the state is bound to, and its SHA-256
    meta      what the caller wants back

Nothing in it is run or trusted: a file is read into a state that the caller made, of
the same structure, and any changed byte is refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cached_tx.files import write_atomically
from cached_tx.ops.fingerprint import describe, fingerprints, named_leaves
from cached_tx.types import State

FORMAT = 1
_OWN = "cached_tx"
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # inside JSON text it has backslashes
_OPEN = "0" * 64  # stands where the seal will be


def save_state(
  path: str | os.PathLike,
  state: State,
  *,
  params: Any,
  config: Mapping[str, Any],
  meta: Mapping[str, Any] | None = None,
) -> None:
  """Writes a state to one file, whole or not at all.

  Args:
    path: of the file; replaced if there is one.
    state: of a model or a layer; all of its arrays, of any dtype, on this process.
    params: the weights of its model, which alone can read it again.
    config: JSON data; of it, all must be the same where the state is read again.
      Top-level keys are named where they differ, so dotted keys say most.
    meta: JSON data that comes back with the state, such as a position in a text.

  Raises:
    ValueError: an array that has parts on other processes.
    TypeError: config or meta have no form in JSON.
  """
  leaves = {name: _on_host(name, leaf) for name, leaf in named_leaves(state).items()}
  values = json.loads(json.dumps(config))
  header = {
    "format": FORMAT,
    "tree": _structure(state),
    "leaves": {
      name: {**describe(leaf), "sha256": _sha256(leaf.tobytes())}
      for name, leaf in leaves.items()
    },
    "weights": _weights(params),
    "config": {"sha256": _config_sha256(values), "values": values},
    "meta": dict(meta or {}),
  }
  metadata = {_OWN: json.dumps(header), "sha256": _OPEN}
  data = safetensors.numpy.save(leaves, metadata)
  begin, end = _seal_place(data)
  seal = _sha256(data).encode()
  write_atomically(Path(path), data[:begin] + seal + data[end:])


def load_state(
  path: str | os.PathLike,
  like: State,
  *,
  params: Any,
  config: Mapping[str, Any],
) -> tuple[State, dict[str, Any]]:
  """Reads a state that `save_state` wrote.

  Args:
    path: of the file.
    like: a state of the same model and rows, for the structure; no number of it
      counts. `model.open_stream(model.initial_state(B), B)`, say. Arrays come back
      where its arrays lie.
    params: the weights of the model.
    config: as given to `save_state`.

  Returns:
    The state, of the type of `like`, and `meta`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged; or it is bound to another config or to other
      weights, or its state has another structure. Names what, and which array.
  """
  data = Path(path).read_bytes()
  try:
    own = _opened(data)
    _check_config(own["config"], config)
    _check_weights(own["weights"], params)
    _check_structure(own, like)
  except _Refused as refused:
    raise ValueError(f"{os.fspath(path)} {refused}") from None
  found = dict(safetensors.deserialize(data))
  arrays = [
    _placed(np.frombuffer(found[name]["data"], leaf.dtype).reshape(leaf.shape), leaf)
    for name, leaf in named_leaves(like).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), arrays), own["meta"]


class _Refused(Exception):
  """Why a file is not loaded; the path goes before it."""


class _Parts(NamedTuple):
  """The file, cut open."""

  top: dict[str, Any]  # the header of the safetensors format
  own: dict[str, Any]  # ours, in its metadata
  arrays: bytes


def _opened(data: bytes) -> dict[str, Any]:
  """Our header of a file of which no byte has changed."""
  try:
    parts = _cut(data)
    begin, end = _seal_place(data)
    whole = data[begin:end].decode() == _sha256(
      data[:begin], _OPEN.encode(), data[end:]
    )
  except (ValueError, KeyError, TypeError):
    raise _Refused(
      "is no state of this package, or its header is damaged or cut off"
    ) from None
  if not whole:
    raise _Refused(f"is damaged: {_damage(parts)}")
  if parts.own["format"] != FORMAT:
    raise _Refused(
      f"has format {parts.own['format']}, but this version reads {FORMAT}: use the "
      "version of the package that wrote it"
    )
  return parts.own


def _cut(data: bytes) -> _Parts:
  """Raises ValueError, KeyError or TypeError where that is not possible."""
  size = int.from_bytes(data[:8], "little")
  if len(data) < 8 + size:
    raise ValueError("shorter than its header")
  top = json.loads(data[8 : 8 + size])
  own = json.loads(top["__metadata__"][_OWN])
  return _Parts(top, own, data[8 + size :])


def _seal_place(data: bytes) -> tuple[int, int]:
  """Where the hash of the whole stands."""
  size = int.from_bytes(data[:8], "little")
  [found] = _SEAL.finditer(data[8 : 8 + size])
  return 8 + found.start(1), 8 + found.end(1)


def _damage(parts: _Parts) -> str:
  """Which part of a damaged file has changed."""
  wrong, length = [], 0
  try:
    for name, leaf in parts.own["leaves"].items():
      begin, end = parts.top[name]["data_offsets"]
      length = max(length, end)
      if _sha256(parts.arrays[begin:end]) != leaf["sha256"]:
        wrong.append(name)
  except (KeyError, TypeError, ValueError, AttributeError):
    wrong, length = [], 0
  if len(parts.arrays) < length:
    return f"it has {len(parts.arrays)} of {length} bytes of arrays, the end is cut off"
  where = f"the array {_listed(wrong)}" if wrong else "its header"
  return f"{where} changed since it was written"


def _check_config(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  given = json.loads(json.dumps(config))
  if saved["sha256"] == _config_sha256(given):
    return
  old = saved["values"]
  lines = [
    f"\n  {key}: saved with {old.get(key, '(absent)')!r}, given "
    f"{given.get(key, '(absent)')!r}"
    for key in sorted(old.keys() | given.keys())
    if key not in old or key not in given or old[key] != given[key]
  ]
  raise _Refused("belongs to a model of another config:" + "".join(lines))


def _check_weights(saved: Mapping[str, Any], params: Any) -> None:
  given = _weights(params)
  names = saved.keys() | given.keys()
  wrong = sorted(n for n in names if saved.get(n) != given.get(n))
  if wrong:
    raise _Refused(
      f"belongs to a model of other weights: {_listed(wrong)} of {len(names)} arrays "
      "differ. A state means something only to the weights that made it; read the "
      "text again with these"
    )


def _check_structure(own: Mapping[str, Any], like: State) -> None:
  tree = _structure(like)
  if own["tree"] != tree:
    raise _Refused(
      f"holds a state of another structure: saved {json.dumps(own['tree'])}, "
      f"expected {json.dumps(tree)}"
    )
  for name, leaf in named_leaves(like).items():
    saved = {key: own["leaves"][name][key] for key in ("shape", "dtype")}
    if saved != describe(leaf):
      raise _Refused(
        f"has {saved['dtype']} of shape {saved['shape']} at {name}, but "
        f"{leaf.dtype} of shape {list(leaf.shape)} is expected: was it saved with "
        "another number of rows?"
      )


def _structure(tree: Any) -> Any:
  """The containers of a pytree as JSON, with the names of their types."""
  if isinstance(tree, tuple) and hasattr(tree, "_fields"):
    fields = zip(tree._fields, tree, strict=True)
    return {type(tree).__name__: {name: _structure(part) for name, part in fields}}
  if isinstance(tree, tuple | list):
    return [_structure(part) for part in tree]
  if isinstance(tree, Mapping):
    return {"dict": {str(key): _structure(part) for key, part in tree.items()}}
  return None if tree is None else "array"


def _weights(params: Any) -> dict[str, dict[str, Any]]:
  """What identifies the parameters, array by array."""
  leaves = named_leaves(jax.tree.map(jnp.asarray, params))
  sums = fingerprints(leaves)
  return {n: {**describe(x), "fingerprint": sums[n]} for n, x in leaves.items()}


def _on_host(name: str, leaf: Any) -> np.ndarray:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    raise ValueError(
      f"{name} has parts on other processes: gather the rows of one process first"
    )
  return np.ascontiguousarray(leaf).reshape(leaf.shape)  # which makes 0-d arrays 1-d


def _placed(array: np.ndarray, like: Any) -> jax.Array:
  """A copy, so that nothing else owns what a later call may be given to overwrite."""
  return jax.device_put(jnp.array(array, copy=True), getattr(like, "sharding", None))


def _config_sha256(values: Any) -> str:
  return _sha256(json.dumps(values, sort_keys=True).encode())


def _sha256(*parts: bytes) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return digest.hexdigest()


def _listed(names: list[str]) -> str:
  more = len(names) - 1
  return names[0] + (f" and {more} more" if more else "")
