"""The official models, and their weights as ours."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax

from cached_tx.convert.pytorch import from_pytorch
from cached_tx.convert.tensorflow import from_tensorflow
from cached_tx.convert.weights import Taken, Weights
from cached_tx.layers import Adaptive
from cached_tx.memory import XLMemory
from cached_tx.models import DecoderLM
from cached_tx.train import sharding
from cached_tx.train.state import init_params

_NEEDED = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tgt_len")
_SHARED = (
  "mem_len", "d_embed", "clamp_len", "same_length", "cutoffs", "div_val", "tie_projs",
  "dropout", "dropatt",
)  # fmt: skip
_OWN = {False: ("tie_weight", "pre_lnorm"), True: ("proj_same_dim", "untie_r")}
_FIXED = {"attn_type": 0, "ext_len": 0, "sample_softmax": -1}  # what there is here
_EPSILON = {False: 1e-5, True: 1e-12}  # of norms; the keys say whether TensorFlow


def model_from_official(
  config: Mapping[str, Any], *, tensorflow: bool = False, **options: Any
) -> DecoderLM:
  """The model that the official code makes of its hyper-parameters.

  Args:
    config: by the names of the official code: n_token, n_layer, n_head, d_model,
      d_head, d_inner, tgt_len; and, where they are not what its model has without
      them, mem_len, d_embed, clamp_len, same_length, cutoffs, div_val, tie_projs,
      dropout, dropatt; tie_weight and pre_lnorm of the PyTorch code, proj_same_dim and
      untie_r of the TensorFlow code.
    tensorflow: whether it is the TensorFlow code, whose memory begins with zeros that
      are attended to, and whose same_length shows a query one token more.
    options: further fields of `DecoderLM`, or others in place of those.

  Raises:
    ValueError: a name that is missing or unknown, or a value that does not fit.
  """
  known = {*_NEEDED, *_SHARED, *_OWN[tensorflow]}
  fixed = [name for name, value in _FIXED.items() if config.get(name, value) == value]
  missing = [name for name in _NEEDED if name not in config]
  unknown = {n: value for n, value in config.items() if n not in {*known, *fixed}}
  if missing or unknown:
    raise ValueError(
      f"of the official hyper-parameters {missing or 'none'} are missing, and "
      f"{unknown or 'none'} have no meaning here"
    )
  get: Callable[..., Any] = config.get
  memory = XLMemory(
    size=get("mem_len", 0),
    clamp=max(get("clamp_len", -1), 0),
    same_length=("pytorch", "tensorflow")[tensorflow] if get("same_length") else "off",
    start="zeros" if tensorflow else "empty",
  )
  fields: dict[str, Any] = dict(
    vocab=config["n_token"],
    layers=config["n_layer"],
    width=config["d_model"],
    heads=config["n_head"],
    head_width=config["d_head"],
    mlp=config["d_inner"],
    segment=config["tgt_len"],
    memories=(memory,),
    positions="relative",
    activation="relu",
    norm="pre_raw" if get("pre_lnorm") else "post",
    norm_bias=True,
    norm_epsilon=_EPSILON[tensorflow],
    output_bias=True,
    tied_biases=not get("untie_r", False),
    dropout=get("dropout", 0.0),
    attention_dropout=get("dropatt", 0.0),
    vocabulary=_choices(config, tensorflow),
  )
  model = DecoderLM(**fields | options)
  model.check()
  return model


def _choices(config: Mapping[str, Any], tensorflow: bool) -> Adaptive | None:
  """What the official code makes of its options of the vocabulary."""
  get: Callable[..., Any] = config.get
  D, cutoffs, divisor = config["d_model"], tuple(get("cutoffs", ())), get("div_val", 1)
  E, tied, clusters = get("d_embed") or D, get("tie_weight", True), len(cutoffs) + 1
  if not cutoffs and E == D and divisor == 1 and tied:
    return None
  own = Adaptive(cutoffs, divisor, 0 if E == D else E, tied)
  if divisor > 1 and D in own.channels(D):
    own = own._replace(project_same_width=get("proj_same_dim", True))
  ties = [*get("tie_projs", ()), *(False,) * clusters][:clusters]
  if tensorflow and not cutoffs:
    ties = [True]  # whatever tie_projs says
  ties = [tie and there for tie, there in zip(ties, own.projected(D), strict=True)]
  return own._replace(tied_projections=tuple(ties) if any(ties) else ())


def from_official_xl(weights: Weights, model: DecoderLM) -> dict[str, Any]:
  """Parameters of `model` from weights of the official code.

  Args:
    weights: by the names of the PyTorch code's state_dict, or of the TensorFlow code's
      variables (which have a "/"), without those of its optimiser. Copies of tied
      weights may be there or not.
    model: of `model_from_official`, or of a config. Its vocabulary may have one id more
      than the weights, the last one: BOS, which the official models do not know. Its
      embedding is 0, and its probability.

  Returns:
    NumPy arrays in float32, or in float64 where the weights are.

  Raises:
    ValueError: the model is not of the official form; or weights are missing, unknown
      or of another shape: lists them.
  """
  tensorflow = any("/" in name for name in weights)
  _check_model(model, tensorflow)
  take = Taken(weights)
  params = (from_tensorflow if tensorflow else from_pytorch)(take, model)
  take.finish()
  _check_shapes(params, model)
  return params


def _check_model(model: DecoderLM, tensorflow: bool) -> None:
  code = "TensorFlow" if tensorflow else "PyTorch"
  for memory in model.memories:
    if not isinstance(memory, XLMemory):
      raise ValueError(
        f"Transformer-XL has no {type(memory).__name__}: set memory.kind to xl"
      )
  wanted: dict[str, tuple[Any, ...]] = {
    "activation": ("relu",),
    "positions": ("relative",),
    "norm": ("post",) if tensorflow else ("post", "pre_raw"),
    "norm_bias": (True,),
    "norm_epsilon": (_EPSILON[tensorflow],),
    "output_bias": (True,),
    "tied_biases": (True, False) if tensorflow else (True,),
  }
  for name, values in wanted.items():
    own = getattr(model, name)
    if own not in values:
      raise ValueError(
        f"model.{name} is {own!r}, but weights of Transformer-XL's {code} code are for "
        + " or ".join(map(repr, values))
      )
  if tensorflow and model.vocabulary is not None and not model.vocabulary.tied:
    raise ValueError(
      "model.vocabulary.tied is False, but Transformer-XL's TensorFlow code always ties"
    )


def _check_shapes(params: dict[str, Any], model: DecoderLM) -> None:
  """Raises ValueError where the model has other parameters than were found."""
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}

  own, given = shapes(sharding.unboxed(boxed)), shapes(params)
  differ = [n for n in sorted(own.keys() | given.keys()) if own.get(n) != given.get(n)]
  if differ:
    raise ValueError(f"official weights give no such parameters: {', '.join(differ)}")
