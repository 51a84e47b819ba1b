"""From the state_dict of the PyTorch code, whose kernels lead with their outputs."""

from typing import Any

import numpy as np

from cached_tx.convert.parts import attention, head_width, sizes, stacked, vocabulary
from cached_tx.convert.weights import Taken
from cached_tx.models import DecoderLM


def from_pytorch(take: Taken, model: DecoderLM) -> dict[str, Any]:
  """Parameters of `model`."""
  D, H = model.width, model.heads
  K = head_width(model)
  blocks = [_block(take, model, i) for i in range(model.layers)]
  frequencies = 10_000.0 ** -(np.arange(0, D, 2) / D)
  take.copy("pos_emb.inv_freq", frequencies, 1e-4)  # a buffer, which we compute
  return {
    **_vocabulary(take, model),
    "content_bias": take("r_w_bias", H, K),
    "distance_bias": take("r_r_bias", H, K),
    "stack": stacked(blocks, len(model.memories)),
  }


def _block(take: Taken, model: DecoderLM, i: int) -> dict[str, Any]:
  D, F, H = model.width, model.mlp, model.heads
  K = head_width(model)
  at, ff = f"layers.{i}.dec_attn.", f"layers.{i}.pos_ff."

  def norm(name: str) -> dict[str, Any]:
    return dict(scale=take(f"{name}.weight", D), bias=take(f"{name}.bias", D))

  def dense(name: str, outputs: int, inputs: int) -> dict[str, Any]:
    kernel = take(f"{name}.weight", outputs, inputs).T
    return dict(kernel=kernel, bias=take(f"{name}.bias", outputs))

  own = attention(
    model,
    take(f"{at}qkv_net.weight", 3 * H * K, D).T,
    take(f"{at}r_net.weight", H * K, D).T,
    take(f"{at}o_net.weight", D, H * K).T,
  )
  mlp = dict(up=dense(f"{ff}CoreNet.0", F, D), down=dense(f"{ff}CoreNet.3", D, F))
  block = dict(attention=own, mlp=mlp, mlp_norm=norm(f"{ff}layer_norm"))
  if model.norm == "pre_raw":
    own["norm"] = norm(f"{at}layer_norm")
  else:
    block["attention_norm"] = norm(f"{at}layer_norm")
  return block


def _vocabulary(take: Taken, model: DecoderLM) -> dict[str, Any]:
  """The clusters' logits stand in reverse: cluster i has the last but i - 1."""
  D = model.width
  of = sizes(take, model, lambda n: [f"crit.out_layers.{i}.bias" for i in range(n)])
  tables, outputs, kernels, own_kernels = {}, {}, {}, {}
  for i, size in enumerate(of.tables):
    shape, name = (size, of.channels[i]), f"crit.out_layers.{i}.weight"
    tables[i] = take(f"word_emb.emb_layers.{i}.weight", *shape)
    if of.choices.tied:
      take.copy(name, tables[i])
    else:
      outputs[i] = take(name, *shape)
  for i in of.kernels:
    kernels[i] = take(f"word_emb.emb_projs.{i}", D, of.channels[i]).T
  for i, there in enumerate(of.projected):
    name = f"crit.out_projs.{i}"
    if there and of.choices.ties()[i]:
      take.copy(name, kernels[i if i in kernels else 0].T)
    elif there:
      own_kernels[i] = take(name, D, of.channels[i]).T
  clusters = cluster_bias = None
  if of.others:
    clusters = take("crit.cluster_weight", of.others, of.channels[0])[::-1]
    cluster_bias = take("crit.cluster_bias", of.others)[::-1]
  bias = [take(name, size) for name, size in zip(of.biases, of.tables, strict=False)]
  return vocabulary(
    of,
    tables,
    np.concatenate(bias),
    kernels=kernels,
    output_tables=outputs,
    output_kernels=own_kernels,
    clusters=clusters,
    cluster_bias=cluster_bias,
  )
