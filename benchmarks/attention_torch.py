"""PyTorch's side of benchmarks/attention.py, for a Python that has torch.

Reads requests, lines of JSON, and answers each with one:

    {"kind": "torch exact", "length": 512, "backward": true}    {"seconds": 0.01}

"torch exact" is scaled_dot_product_attention; "performer-pytorch" is that package's
FastAttention in its form for CPUs, which it calls inefficient itself.
"""

import json
import sys
import time

import torch

B, H, K, R = 1, 8, 64, 256


def _attend(kind):
  if kind == "torch exact":
    plain = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: plain(q, k, v, is_causal=True)
  from performer_pytorch import FastAttention

  return FastAttention(dim_heads=K, nb_features=R, causal=True)


def main():
  """Answers requests until there are no more."""
  torch.manual_seed(0)
  torch.set_num_threads(int(sys.argv[1]))
  answers, sys.stdout = sys.stdout, sys.stderr  # where that package says things
  attends, arrays = {}, {}
  for line in sys.stdin:
    asked = json.loads(line)
    kind, length = asked["kind"], asked["length"]
    attend = attends.setdefault(kind, _attend(kind))
    if length not in arrays:
      arrays[length] = [torch.randn(B, H, length, K) * 0.5 for _ in range(4)]
    *inputs, slope = arrays[length]
    inputs = [x.clone().requires_grad_(asked["backward"]) for x in inputs]
    begin = time.perf_counter()
    out = attend(*inputs)
    if asked["backward"]:
      out.backward(slope)
    seconds = time.perf_counter() - begin
    answer = {"seconds": seconds}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main()
