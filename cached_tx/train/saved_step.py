"""The files of one checkpoint: what is written, how it is read and verified."""

import contextlib
import gc
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cached_tx.ops.fingerprint import describe, fingerprints, is_key, named_leaves

_FORMAT = 1  # of the JSON item


class DamagedCheckpoint(ValueError):
  """A checkpoint cannot be read, or holds other values than were saved."""


class Mismatch(ValueError):
  """The checkpoint is sound, but of another state than the target."""


def pack(
  state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what is stored of a state: nested dicts of arrays, and the JSON item.

  Waits for the arrays, whose fingerprints go into the JSON item.

  Raises:
    ValueError: a leaf of `state` is not a jax array.
  """
  leaves = named_leaves(state)
  for name, leaf in leaves.items():
    if not isinstance(leaf, jax.Array):
      raise ValueError(
        f"state leaf {name!r} is a {type(leaf).__name__}: a train state holds jax"
        " arrays only; plain data belongs into meta"
      )
  sums = fingerprints(leaves)
  body = {
    "format": _FORMAT,
    "meta": dict(meta),
    "metrics": {k: float(v) for k, v in metrics.items()},
    "leaves": {
      name: {**describe(x), "fingerprint": sums[name]} for name, x in leaves.items()
    },
  }
  return _nested({name: _data(x) for name, x in leaves.items() if x.size}), _signed(
    body
  )


class StepReader:
  """Reads and verifies the steps in a folder of checkpoints."""

  def __init__(self, directory: Path):
    import orbax.checkpoint as ocp

    self._directory = directory
    self._arrays = ocp.PyTreeCheckpointHandler()
    self._json = ocp.JsonCheckpointHandler()

  def close(self):
    """Releases the threads."""
    self._arrays.close()
    self._json.close()

  def read(self, step: int, target: Any, branch: str = "") -> Any:
    """Returns a verified state, or one branch of it, and the caller's meta.

    Raises in every process if it fails in one. No barrier of Orbax's runs in here:
    where one process alone fails, the others would wait in it. They learn of it in
    `_together` instead.

    Raises:
      Mismatch: the step is of another state than `target`.
      Exception: the step is damaged (Orbax raises that bare class).
    """
    prefix = f"{branch}/" if branch else ""
    wanted = {prefix + name: leaf for name, leaf in named_leaves(target).items()}
    with _together():
      body = self.read_body(step)
    stored = {n: d for n, d in body["leaves"].items() if n.startswith(prefix)}
    _check_same(stored, wanted)
    abstract = {name: _abstract_data(name, leaf) for name, leaf in wanted.items()}
    with _together():
      try:
        arrays = self._read_arrays(step, abstract)
      except Exception as error:
        error.add_note(self._first_unreadable(step, abstract))
        raise
    leaves = {name: _like(leaf, arrays[name]) for name, leaf in wanted.items()}
    sums = fingerprints(leaves)
    wrong = [n for n in leaves if sums[n] != stored[n]["fingerprint"]]
    if wrong:
      raise DamagedCheckpoint(f"fingerprint differs in {_listed(wrong)}")
    state = jax.tree.unflatten(jax.tree.structure(target), list(leaves.values()))
    return state, body["meta"]

  def read_body(self, step: int) -> dict[str, Any]:
    """Returns the JSON item: meta, metrics and a description of every array."""
    signed = self._json.restore(self._directory / str(step) / "meta")
    body = {k: v for k, v in signed.items() if k != "sha256"}
    if _signed(body) != signed:
      raise DamagedCheckpoint("the meta item is not what was saved (sha256 differs)")
    return body

  def _read_arrays(
    self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]
  ) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    arrays = {name: _empty(x) for name, x in abstract.items() if not x.size}
    tree = _nested({name: x for name, x in abstract.items() if x.size})
    if tree:
      restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
      args = ocp.args.PyTreeRestore(
        item=tree, restore_args=restore_args, partial_restore=True
      )
      path = self._directory / str(step) / "state"
      arrays |= named_leaves(self._arrays.restore(path, args=args))
    return arrays

  def _first_unreadable(
    self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]
  ) -> str:
    """Says which array cannot be read; Orbax does not."""
    for name, leaf in abstract.items():
      try:
        self._read_arrays(step, {name: leaf})
      except Exception:
        return f"reading the array {name}"
    return "every array alone can be read"


class _together:
  """Raises in every process where one of them failed in the block."""

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if jax.process_count() == 1 or isinstance(error, KeyboardInterrupt):
      return
    good = multihost_utils.process_allgather(np.bool_(error is None))
    if error is None and not good.all():
      where = np.flatnonzero(~good).tolist()
      raise DamagedCheckpoint(f"reading failed in process {_listed(where)}")


@contextlib.contextmanager
def abandoned_reads_keep_quiet():
  """Silences the reads that Orbax leaves behind when one of them fails.

  Each would print a traceback when it ends or is collected, and bury the one line
  that says which array is damaged.
  """
  hook = sys.unraisablehook

  def quiet(info):
    closed = "Event loop is closed" in str(info.exc_value)
    if not closed and not inspect.iscoroutine(info.object):
      hook(info)

  sys.unraisablehook = quiet
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook = hook


def _check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any]):
  lines = []
  for name in sorted(stored.keys() | wanted.keys()):
    old = {k: stored[name][k] for k in ("shape", "dtype")} if name in stored else None
    new = describe(wanted[name]) if name in wanted else None
    if old != new:
      lines.append(f"\n  {name}: stored {_short(old)}, wanted {_short(new)}")
  if lines:
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    raise Mismatch(
      "the checkpoint is of another state: use the config it was trained with"
      f" (config.json), or a new workdir.{''.join(lines[:10])}{more}"
    )


def _short(description: dict[str, Any] | None) -> str:
  if description is None:
    return "nothing"
  return f"{description['dtype']}{description['shape']}"


def _listed(names: list) -> str:
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return ", ".join(map(str, names[:5])) + more


def _signed(body: dict[str, Any]) -> dict[str, Any]:
  """`body` as JSON gives it back, with the hash of its canonical text."""
  text = json.dumps(body, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return {**json.loads(text), "sha256": digest}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _data(leaf: jax.Array) -> jax.Array:
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _abstract_data(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
  if getattr(leaf, "sharding", None) is None:
    raise Mismatch(
      f"the target {name!r} has no sharding, so it is unknown where to put the"
      " array: give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
    )
  abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  data = jax.eval_shape(jax.random.key_data, abstract) if is_key(leaf) else abstract
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _empty(abstract: jax.ShapeDtypeStruct) -> jax.Array:
  # Not through jit: its shards of an empty array have the global shape.
  zeros = np.zeros(abstract.shape, abstract.dtype)
  return jax.make_array_from_callback(
    abstract.shape, abstract.sharding, lambda index: zeros[index]
  )


def _like(leaf: Any, data: jax.Array) -> jax.Array:
  """`data` as `leaf` is typed: PRNG keys are made from their words."""
  if not is_key(leaf):
    return data
  kinds = []
  abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), abstract)
  return jax.random.wrap_key_data(data, impl=kinds[0])
