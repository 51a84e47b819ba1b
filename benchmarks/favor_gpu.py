r"""Causal FAVOR+ on a GPU: our three forms beside other linear attentions.

python -m benchmarks.favor_gpu                    what runs in JAX
python -m benchmarks.favor_gpu --torch PYTHON     and fla, in that Python

B 1, H 96, 128 features, bfloat16, 8,192 tokens; heads 128 and 256 wide. First the
kernel is compared with all pairs in float64 on the device; if it is wrong, nothing is
timed. Then kinds take turns in every round, and a number is the median of the rounds.
Others get features of queries and keys as inputs, which they are not charged for.
Records are lines of benchmarks/results/favor_gpu.jsonl. Without a GPU it exits with 2.

"fla" is flash-linear-attention, "jla" jax-linear-attention, if it is installed.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import ROOT, describe
from benchmarks.records import RESULTS, append
from cached_tx.ops.favor import favor_attention, no_sums
from cached_tx.ops.favor_kernel import favor_kernel
from cached_tx.ops.projections import project
from cached_tx.tables import aligned
from cached_tx.types import Segment

B, L, H, R = 1, 8192, 96, 128
WIDTHS = (128, 256)
CHUNKS = (64, 128)  # of the kernel, each a kind
CALLS = 10  # of a kind in a round, one after another
ALLOWED = {"float32": 1e-5, "bfloat16": 3e-2}  # errors, of the largest number
NAMES = ("forward", "both")
TORCH_KINDS = ("fla simple_gla", "fla linear_attn")
Attend = Callable[..., jax.Array]


def _favor(form: str, chunk: int = 128) -> Attend:
  def attend(q, k, v, w):
    sums = no_sums(q.shape[0], q.shape[2], w.shape[0], v.shape[-1])
    segment = Segment(jnp.zeros(q.shape[:2], bool))
    return favor_attention(q, k, v, w, segment, sums, chunk=chunk, form=form)[0]

  return attend


def kinds() -> dict[str, Attend]:
  """What runs in JAX here."""
  found = {
    "ours, associative": _favor("associative"),
    "ours, scan": _favor("scan"),
    **{f"ours, kernel of {c}": _favor("kernel", c) for c in CHUNKS},
  }
  if importlib.util.find_spec("jla") is not None:
    ops = importlib.import_module("jla.ops")

    def gated(q, k, v, w):
      del w
      decay = jnp.zeros(q.shape[:3], jnp.float32)
      return ops.linear_attention("simple_gla", q, k, v, g=decay, scale=1.0)[0]

    found["jla simple_gla"] = gated
  return found


def pairs(q, k, v, w, starts, valid):
  """All pairs: the definition."""
  grown = lambda x: jnp.exp(
    jnp.einsum("blhk,rk->blhr", x, w) - (x**2).sum(axis=-1, keepdims=True) / 2
  )
  weights = jnp.einsum("bqhr,bshr->bhqs", grown(q), grown(k))
  own = jnp.cumsum(starts & valid, axis=1)
  seen = jnp.tril(own[:, :, None] == own[:, None]) & valid[:, None]
  weights = jnp.where(seen[:, None], weights, 0)
  below = weights.sum(axis=-1)
  weights = weights / jnp.where(below == 0, 1, below)[..., None]
  return jnp.where(valid[..., None, None], jnp.einsum("bhqs,bshk->bqhk", weights, v), 0)


def errors(
  dtype: str, length: int, width: int, rows: int, chunk: int, interpret: bool = False
) -> dict[str, float]:
  """Of the kernel's output and gradients, relative to the largest number of each."""
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(2, length, 2, width))
  *tokens, direction = (jnp.asarray(0.5 * draw(), dtype) for _ in range(4))
  w = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
  starts, valid = (jnp.asarray(rng.random((2, length)) < p) for p in (0.02, 0.9))

  def ours(q, k, v):
    sums = no_sums(2, 2, rows, width)
    options: Any = {"chunk": chunk, "interpret": interpret}
    return favor_kernel(q, k, v, w, Segment(starts, valid), sums, **options)[0]

  def all_of(attend, tokens, direction):
    out, pull = jax.vjp(attend, *tokens)
    return out, *pull(direction.astype(out.dtype))

  got = jax.jit(functools.partial(all_of, ours))(tokens, direction)
  with jax.enable_x64(True), jax.default_matmul_precision("highest"):
    wide = [jnp.asarray(np.float64(x)) for x in (*tokens, direction, w)]
    definition = lambda *x: pairs(*x, wide[4], starts, valid)
    want = jax.jit(functools.partial(all_of, definition))(wide[:3], wide[3])
  got, want = ([np.asarray(x).astype(np.float64) for x in y] for y in (got, want))
  return {
    name: float(np.abs(a - b).max() / np.abs(b).max())
    for name, a, b in zip(("out", "q", "k", "v"), got, want, strict=True)
  }


def check() -> None:
  """Compares the kernel with all pairs on this device, in every form that is timed.

  Raises:
    SystemExit: it is wrong.
  """
  coarse = [("bfloat16", width, chunk) for width in (64, *WIDTHS) for chunk in CHUNKS]
  # Larger chunks in float32 need more shared memory than a program may have.
  for dtype, width, chunk in [("float32", 64, 32), ("float32", 128, 32), *coarse]:
    name = f"{dtype}, heads {width} wide, chunks of {chunk}"
    try:
      found = errors(dtype, 1000, width, R, chunk)
    except Exception as error:  # of a compiler; it is named again where it is timed
      print(f"the kernel does not run: {name}: {error}"[:500], flush=True)
      continue
    print(f"errors of the kernel, {name}: {found}", flush=True)
    if not all(x < ALLOWED[dtype] for x in found.values()):  # NaN is wrong too
      raise SystemExit(f"the kernel is wrong: {name}: {found}")


class Case:
  """One kind at one head width, compiled: forward, and forward with backward."""

  def __init__(
    self, attend: Attend, width: int, features: bool, length: int, heads: int
  ):
    key = jax.random.key(0)
    w = project("orthogonal", key, R, width)
    draw = lambda i, size: (
      0.5 * jax.random.normal(jax.random.fold_in(key, i), (B, length, heads, size))
    ).astype(jnp.bfloat16)
    q, k = (draw(i, R if features else width) for i in range(2))
    q, k = (jnp.exp(x) if features else x for x in (q, k))
    self._inputs = q, k, draw(2, width), draw(3, width), w

    def both(q, k, v, slope, w):
      out, pull = jax.vjp(lambda *x: attend(*x, w), q, k, v)
      return out, pull(slope.astype(out.dtype))

    forward = lambda q, k, v, slope, w: attend(q, k, v, w)
    compiled = lambda f: jax.jit(f).lower(*self._inputs).compile()
    made = dict(zip(NAMES, (forward, both), strict=True))
    self._run = {name: compiled(f) for name, f in made.items()}
    self.temporary = {
      name: run.memory_analysis().temp_size_in_bytes for name, run in self._run.items()
    }

  def seconds(self, name: str) -> float:
    """Of one call, when several follow one another."""
    run = self._run[name]
    jax.block_until_ready(run(*self._inputs))
    begin = time.perf_counter()
    for _ in range(CALLS):
      out = run(*self._inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / CALLS


@contextlib.contextmanager
def torch_process(python: str | None) -> Iterator[Callable[..., float] | None]:
  """A way to ask PyTorch for the time of a call, in a process of its own."""
  if python is None:
    yield None
    return
  path = ROOT / "benchmarks" / "favor_gpu_torch.py"
  with subprocess.Popen(
    [python, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:

    def ask(kind: str, width: int, name: str) -> float:
      shape = {"batch": B, "length": L, "heads": H, "features": R, "width": width}
      request = shape | {"kind": kind, "backward": name == "both", "calls": CALLS}
      process.stdin.write(json.dumps(request) + "\n")
      process.stdin.flush()
      answer = json.loads(process.stdout.readline() or '{"error": "it ended"}')
      if "error" in answer:
        raise RuntimeError(answer["error"])
      return answer["seconds"]

    yield ask
    process.stdin.close()


def measure(width: int, rounds: int, ask: Callable[..., float] | None) -> list[dict]:
  """A record per kind: its times, or why there are none."""
  timers: dict[str, Callable[[str], float]] = {}
  found: dict[str, dict[str, Any]] = {}
  for kind, attend in kinds().items():
    try:
      case = Case(attend, width, not kind.startswith("ours"), L, H)
    except Exception as error:  # of a compiler; the others are measured all the same
      found[kind] = {"error": f"{type(error).__name__}: {error}"[:500]}
      continue
    timers[kind] = case.seconds
    found[kind] = {f"{n}_temporary": size for n, size in case.temporary.items()}
  if ask is not None:
    for kind in TORCH_KINDS:
      timers[kind] = functools.partial(ask, kind, width)
      found[kind] = {}
  times: dict[tuple[str, str], list[float]] = {}
  for number in range(rounds + 1):  # the first one warms up
    for kind in list(timers):
      for name in NAMES:
        try:
          seconds = timers[kind](name)
        except Exception as error:  # as above: memory, or a package that is missing
          found[kind] = {"error": f"{type(error).__name__}: {error}"[:500]}
          del timers[kind]
          break
        if number:
          times.setdefault((kind, name), []).append(seconds)
  for kind in timers:
    for name in NAMES:
      found[kind][f"{name}_ms"] = 1e3 * statistics.median(times[kind, name])
      found[kind][f"{name}_fastest_ms"] = 1e3 * min(times[kind, name])
  about = {"length": L, "width": width, "heads": H, "features": R, "rounds": rounds}
  return [{"kind": kind} | about | record for kind, record in found.items()]


def main():
  """Checks, measures, writes and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch", help="a Python that has torch and fla")
  parser.add_argument("--rounds", type=int, default=20)
  given = parser.parse_args()
  # Before JAX looks for devices: PyTorch needs some of the memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if jax.default_backend() != "gpu":
    print(
      f"there is no GPU here: JAX runs on {jax.devices()[0].device_kind}. Nothing was "
      "measured",
      file=sys.stderr,
    )
    raise SystemExit(2)
  about = describe()
  check()
  rows = [("kind", "width", "forward ms", "with backward ms")]
  with torch_process(given.torch) as ask:
    for width in WIDTHS:
      for record in measure(width, given.rounds, ask):
        append(RESULTS / "favor_gpu.jsonl", record | about)
        shown = (
          ("-", record["error"])
          if "error" in record
          else tuple(f"{record[f'{name}_ms']:,.2f}" for name in NAMES)
        )
        rows.append((record["kind"], str(width), *shown))
  print("\n".join(aligned(rows)))


if __name__ == "__main__":
  main()
