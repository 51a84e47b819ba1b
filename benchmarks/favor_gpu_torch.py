"""PyTorch's side of benchmarks/favor_gpu.py, for a Python that has torch and fla.

Reads requests, lines of JSON, and answers each with one:

    {"kind": "fla simple_gla", "width": 128, "backward": true, ...}    {"seconds": 0.01}

or with {"error": ...}. Queries and keys are features already, of `features` numbers.
"""

import json
import sys
import time


def _attend(kind):
  if kind == "fla simple_gla":
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v: chunk_simple_gla(q, k, v, scale=1.0)[0]
  from fla.ops.linear_attn import chunk_linear_attn

  return lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]


def _inputs(asked):
  import torch

  torch.manual_seed(0)
  shape = asked["batch"], asked["length"], asked["heads"]
  sizes = (asked["features"],) * 2 + (asked["width"],) * 2
  draw = lambda size: torch.randn(*shape, size, device="cuda", dtype=torch.bfloat16) / 2
  q, k, v, slope = map(draw, sizes)
  return [q.exp(), k.exp(), v, slope]


def _seconds(asked, attend, arrays):
  import torch

  *tokens, slope = arrays
  tokens = [x.detach().requires_grad_(asked["backward"]) for x in tokens]

  def once():
    out = attend(*tokens)
    if asked["backward"]:
      torch.autograd.grad(out, tokens, slope.to(out.dtype))

  once()
  torch.cuda.synchronize()
  begin = time.perf_counter()
  for _ in range(asked["calls"]):
    once()
  torch.cuda.synchronize()
  return (time.perf_counter() - begin) / asked["calls"]


def main():
  """Answers requests until there are no more."""
  answers, sys.stdout = sys.stdout, sys.stderr  # where packages say things
  attends, arrays = {}, {}
  for line in sys.stdin:
    asked = json.loads(line)
    kind, width = asked["kind"], asked["width"]
    try:
      attend = attends.get(kind) or attends.setdefault(kind, _attend(kind))
      if width not in arrays:
        arrays.clear()
        arrays[width] = _inputs(asked)
      answer = {"seconds": _seconds(asked, attend, arrays[width])}
    except Exception as error:
      answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main()
