"""From the variables of the TensorFlow code, whose kernels lead with their inputs."""

from typing import Any

import numpy as np

from cached_tx.convert.parts import attention, head_width, sizes, stacked, vocabulary
from cached_tx.convert.weights import Taken
from cached_tx.models import DecoderLM

EMBED, SOFTMAX = "transformer/adaptive_embed/", "transformer/adaptive_softmax/"


def from_tensorflow(take: Taken, model: DecoderLM) -> dict[str, Any]:
  """Parameters of `model`."""
  H, N = model.heads, model.layers
  K = head_width(model)
  shape = (H, K) if model.tied_biases else (N, H, K)
  u = take("transformer/r_w_bias", *shape)
  v = take("transformer/r_r_bias", *shape)
  blocks = [_block(take, model, i) for i in range(N)]
  shared: dict[str, Any] = {}
  if model.tied_biases:
    shared = dict(content_bias=u, distance_bias=v)
  else:
    for i, block in enumerate(blocks):
      block["attention"] |= dict(content_bias=u[i], distance_bias=v[i])
  stack = stacked(blocks, len(model.memories))
  return {**_vocabulary(take, model), **shared, "stack": stack}


def _block(take: Taken, model: DecoderLM, i: int) -> dict[str, Any]:
  D, F, H = model.width, model.mlp, model.heads
  K = head_width(model)
  at, ff = f"transformer/layer_{i}/rel_attn", f"transformer/layer_{i}/ff"

  def norm(name: str) -> dict[str, Any]:
    name = f"{name}/LayerNorm"
    return dict(scale=take(f"{name}/gamma", D), bias=take(f"{name}/beta", D))

  def dense(name: str, inputs: int, outputs: int) -> dict[str, Any]:
    kernel = take(f"{name}/kernel", inputs, outputs)
    return dict(kernel=kernel, bias=take(f"{name}/bias", outputs))

  own = attention(
    model,
    take(f"{at}/qkv/kernel", D, 3 * H * K),
    take(f"{at}/r/kernel", D, H * K),
    take(f"{at}/o/kernel", H * K, D),
  )
  mlp = dict(up=dense(f"{ff}/layer_1", D, F), down=dense(f"{ff}/layer_2", F, D))
  return dict(attention=own, mlp=mlp, attention_norm=norm(at), mlp_norm=norm(ff))


def _biases(clusters: int) -> list[str]:
  if clusters == 1:
    return [f"{SOFTMAX}bias"]
  return [f"{SOFTMAX}cutoff_{i}/b" for i in range(clusters)]


def _vocabulary(take: Taken, model: DecoderLM) -> dict[str, Any]:
  D = model.width
  of = sizes(take, model, _biases)
  clusters = [f"cutoff_{i}/" for i in range(len(of.clusters))]
  own = clusters if of.choices.divisor > 1 else [""]  # where embeddings are
  tables = {
    i: take(f"{EMBED}{own[i]}lookup_table", size, of.channels[i])
    for i, size in enumerate(of.tables)
  }
  kernels = {i: take(f"{EMBED}{own[i]}proj_W", of.channels[i], D) for i in of.kernels}
  output_kernels = {
    i: take(f"{SOFTMAX}{clusters[i]}proj", of.channels[i], D)
    for i, there in enumerate(of.projected)
    if there and not of.choices.ties()[i]
  }
  words = cluster_bias = None
  if of.others:
    shape = (of.others, of.channels[0])
    words = take(f"{SOFTMAX}cutoff_0/cluster_W", *shape)
    cluster_bias = take(f"{SOFTMAX}cutoff_0/cluster_b", of.others)
  bias = [take(name, size) for name, size in zip(of.biases, of.clusters, strict=True)]
  return vocabulary(
    of,
    tables,
    np.concatenate(bias),
    kernels=kernels,
    output_tables={},
    output_kernels=output_kernels,
    clusters=words,
    cluster_bias=cluster_bias,
  )
