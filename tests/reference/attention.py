"""One attention layer and its memory, token by token, in float64.

Slow and plain on purpose: one row, one query at a time, one line per equation. Every
function takes a layer's parameters as nested mappings of arrays, with the names that
the layer gives them. A token is (x, start); a history is a list of tokens.
"""

import math

import numpy as np


def softmax(scores):
  """Of one list of numbers."""
  e = np.exp(scores - np.max(scores))
  return e / e.sum()


def rotate(x, position):
  """Rotary: pair (a, a + K / 2) turns by position * 10000^(-a / (K / 2))."""
  half = len(x) // 2
  turns = np.round(10_000.0 ** -(np.arange(half) / half) / (2 * np.pi) * 2.0**32)
  angle = position * turns * 2 * np.pi / 2.0**32
  a, b = x[:half], x[half:]
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
  )


def sinusoid(distance, width):
  """R of Transformer-XL: sines, then cosines."""
  angle = distance * 10_000.0 ** -(np.arange(0, width, 2) / width)
  return np.concatenate([np.sin(angle), np.cos(angle)])


def weigh(params, positions, query, keys):
  """Weights (H, keys) of one query over `keys`: a list of (input, distance)."""
  wq, wk = (params[name]["kernel"] for name in ("query", "key"))
  bq, bk = (params[n].get("bias", np.zeros(wq.shape[1:])) for n in ("query", "key"))
  width, H, K = wq.shape
  weights = []
  for h in range(H):
    scores = []
    for y, distance in keys:
      q, k = query @ wq[:, h] + bq[h], y @ wk[:, h] + bk[h]
      if positions == "rotary":
        score = rotate(q, distance) @ k
      elif positions == "relative":
        r = sinusoid(distance, width) @ params["distance"]["kernel"][:, h]
        u, v = params["content_bias"][h], params["distance_bias"][h]
        score = (q + u) @ k + (q + v) @ r
      else:
        score = q @ k
      scores.append(score / np.sqrt(K))
    weights.append(softmax(np.array(scores)))
  return np.array(weights)


def attend(params, positions, query, keys):
  """Heads (H, K) of one query over `keys`."""
  wv = params["value"]["kernel"]
  weights = weigh(params, positions, query, keys)
  values = [np.einsum("d,dhk->hk", y, wv) for y, _ in keys]
  return sum(p[:, None] * v for p, v in zip(weights.T, values, strict=True))


def joined(params, heads):
  """The output projection."""
  return np.einsum("hk,hkd->d", heads, params["output"]["kernel"])


def document(history):
  """The tokens since the last start, and whether there was one."""
  own = []
  for x, start in history:
    own = [x] if start else [*own, x]
  return own, any(start for _, start in history)


def transformer_xl(
  params, positions, tokens, segment, size, clamp=None, window=None, zeros=False
):
  """Outputs, and the last inputs of the document, the newest last."""
  width = len(tokens[0][0])
  before = [np.zeros(width)] * size if zeros else []  # every document
  memory, now, outs = before, [], []
  for x, start in tokens:
    now.append((x, start))
    own, began = document(now)
    seen = (before if began else memory) + own
    keys = [(y, len(seen) - 1 - i) for i, y in enumerate(seen)]
    keys = keys if window is None else keys[-window:]
    keys = keys if clamp is None else [(y, min(d, clamp)) for y, d in keys]
    outs.append(joined(params, attend(params, positions, x, keys)))
    if len(now) == segment:
      memory = seen[len(seen) - min(size, len(seen)) :]
      now = []
  return outs, memory


def compressive(
  params, positions, tokens, segment, size, compressed, rate, kind, life=False
):
  """Outputs, recent inputs and compressed slots: Algorithm 1 of Rae et al.

  Places that hold nothing are None: FIFOs have a fixed number of places, and what is
  pushed takes one whether it is of the document or not. `kind` most_used keeps the
  tokens that the last segment attended most; with `life`, all that found them.
  """
  names = ("query", "key", "value")
  bare = {name: {"kernel": params[name]["kernel"]} for name in names}  # no biases
  recent, slots, now, outs = [None] * size, [None] * compressed, [], []
  usage, met = [0.0] * size, [0] * size  # weight in sum, over so many segments
  used = [0.0] * (compressed + size + segment)
  reconstruction = 0.0
  for x, start in tokens:
    now.append((x, start))
    own, began = document(now)
    past = [None] * (compressed + size) if began else slots + recent
    places = past + [None] * (len(now) - len(own)) + own
    keys = [(y, len(places) - 1 - i) for i, y in enumerate(places) if y is not None]
    outs.append(joined(params, attend(params, positions, x, keys)))
    if start:
      used = [0.0] * len(used)
    weights = weigh(params, positions, x, keys).mean(axis=0)
    for i, weight in zip(
      [i for i, y in enumerate(places) if y is not None], weights, strict=True
    ):
      used[i] += weight / segment
    if len(now) < segment:
      continue
    gone = [None] * (segment - len(own))  # of earlier documents
    queue = ([None] * size if began else recent) + gone + own
    usage = [u * life + w for u, w in zip(usage, used[compressed:], strict=False)]
    met = [n * life + 1 for n in met]
    worth = [u / n for u, n in zip(usage, met, strict=True)] + used[compressed + size :]
    usage = (usage + [0.0] * segment)[segment:]
    met = (met + [0] * segment)[segment:]
    left, recent = queue[:segment], queue[segment:]
    usage = [0.0 if y is None else u for u, y in zip(usage, recent, strict=True)]
    slots = [None] * compressed if began else slots
    new = []
    for i in range(0, segment, rate):
      block = left[i : i + rate]
      if any(y is None for y in block):
        new.append(None)
      elif kind == "mean":
        new.append(sum(block) / rate)
      elif kind == "max":
        new.append(np.max(block, axis=0))
      elif kind == "conv":
        kernel = params["memory"]["compressor"]["kernel"]
        new.append(sum(y @ w for y, w in zip(block, kernel, strict=True)))
    if kind == "most_used":
      there = [i for i, y in enumerate(left) if y is not None]
      best = sorted(there, key=lambda i: (-worth[i], i))[: segment // rate]
      new = [None] * (segment // rate - len(best)) + [left[i] for i in sorted(best)]
    if kind == "conv" and any(y is not None for y in new):
      gap = 0.0
      for y in own:  # Algorithm 2: content alone, one norm over all queries
        wanted = attend(bare, "none", y, [(z, 0) for z in left if z is not None])
        given = attend(bare, "none", y, [(z, 0) for z in new if z is not None])
        gap += ((given - wanted) ** 2).sum()
      reconstruction += np.sqrt(gap)
    slots = (slots + new)[len(new) :]
    now, used = [], [0.0] * len(used)
  return outs, recent, slots, reconstruction, usage if life else None


def sigmoid(x):
  """1 / (1 + e^-x)."""
  return 1 / (1 + np.exp(-x))


def gated(
  params,
  positions,
  tokens,
  segment,
  size,
  channels,
  inner=0,
  attention=False,
  norm=False,
):
  """Outputs, and the cache or None: equations 1 to 5 of Zhang et al.

  With a memory of `inner` tokens beside the cache; the cache summarises the attention
  where `attention`, else the input; `norm`: the candidate of the authors' code.
  """
  heads = len(params["gate"])
  cache, now, outs, found_now, memory = None, [], [], [], []
  own_params = params["own"]
  cell = params["memory"]
  linear = lambda name, y: y @ cell[name]["kernel"] + cell[name]["bias"]
  for x, start in tokens:
    now.append((x, start))
    own, began = document(now)
    context = own if began else memory + own
    keys = [(y, len(context) - 1 - i) for i, y in enumerate(context)]
    out = attend(own_params, positions, x, keys)
    found_now.append((out.reshape(-1), start))
    if cache is not None and not began:
      names = {"query": "memory_query", "key": "memory_key", "value": "memory_value"}
      branch = {short: params[name] for short, name in names.items()}
      found = attend(branch, "none", x[:channels], [(c, 0) for c in cache])  # eq. 3
      found = np.pad(found, ((0, 0), (0, out.shape[1] - channels // heads)))
      g = sigmoid(params["gate"])[:, None]
      out = g * found + (1 - g) * out  # eq. 2
    outs.append(joined(params, out))
    if len(now) < segment:
      continue
    old = np.zeros((size, channels)) if cache is None or began else cache
    source = document(found_now)[0] if attention else own
    new = [source[i * len(own) // size][:channels] for i in range(size)]
    cache = np.zeros((size, channels))
    for i in range(size):
      both = np.concatenate([new[i], old[i]])
      update, reset = sigmoid(linear("update", both)), sigmoid(linear("reset", both))
      candidate = linear("candidate", np.concatenate([new[i], reset * old[i]]))
      if norm:
        y = np.array([a * (1 + math.erf(a / math.sqrt(2))) / 2 for a in candidate])
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-5)
        candidate = y * cell["candidate_norm"]["scale"] + cell["candidate_norm"]["bias"]
      cache[i] = (1 - update) * old[i] + update * candidate  # eq. 5
    memory = context[len(context) - min(inner, len(context)) :]
    now, found_now = [], []
  return outs, cache


def favor(params, positions, tokens, w):
  """Outputs, and the unscaled sums of phi(k) v and phi(k): no stabilisation."""
  wq, wk, wv = (params[name]["kernel"] for name in ("query", "key", "value"))
  bq, bk = (params[n].get("bias", np.zeros(wq.shape[1:])) for n in ("query", "key"))
  _, H, K = wq.shape
  R = len(w)
  values, keys, place, outs = np.zeros((H, R, K)), np.zeros((H, R)), 0, []
  phi = lambda x: np.exp(w @ x - x @ x / 2) / np.sqrt(len(w))
  for x, start in tokens:
    if start:
      values, keys, place = np.zeros((H, R, K)), np.zeros((H, R)), 0
    out = np.zeros((H, K))
    for h in range(H):
      q, k, v = x @ wq[:, h] + bq[h], x @ wk[:, h] + bk[h], x @ wv[:, h]
      if positions == "rotary":
        q, k = rotate(q, place), rotate(k, place)
      q, k = q / K**0.25, k / K**0.25
      values[h] += phi(k)[:, None] * v[None]
      keys[h] += phi(k)
      out[h] = phi(q) @ values[h] / (phi(q) @ keys[h])
    place += 1
    outs.append(joined(params, out))
  return outs, values, keys
