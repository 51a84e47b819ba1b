"""Prints how far the package is from every golden file.

JAX_PLATFORMS=cpu python -m tests.parity

It runs the tests that read the files, and notes the errors that they look at. These are
the first and last columns of the table of docs/parity.md; the one between them, what is
compared, is written by hand.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from tests.kinds import precision  # noqa: E402
from tests.layers import (  # noqa: E402
  test_attentions_golden,
  test_compressive,
  test_favor_golden,
  test_grc_golden,
  test_transformer_xl,
)
from tests.models import test_lra_golden  # noqa: E402
from tests.models import test_transformer_xl as test_models  # noqa: E402
from tests.ops import test_compress  # noqa: E402


class Errors:
  """The largest error, relative to the largest number of its array, and how many."""

  def __init__(self):
    self.worst, self.arrays = 0.0, 0

  def note(self, got: Any, want: Any, _: Any = None, largest: Any = None) -> None:
    """Takes the place of a comparison: of arrays, or of trees of them."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for a, b in ((np.asarray(a), np.asarray(b)) for a, b in pairs):
      assert a.shape == b.shape, (a.shape, b.shape)
      self.arrays += 1
      if b.dtype.kind != "f":
        assert (a == b).all()
      elif b.size:
        gap = np.abs(np.float64(a) - np.float64(b)).max()
        error = float(gap / (np.abs(b).max() or 1.0 if largest is None else largest))
        assert math.isfinite(error)  # max() would pass over a NaN
        self.worst = max(self.worst, error)


def calls(test: Any) -> Iterator[dict[str, Any]]:
  """The arguments that a test is parametrised with."""
  marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
  for picked in itertools.product(*(mark.args[1] for mark in marks)):
    found: dict[str, Any] = {}
    for mark, value in zip(marks, picked, strict=True):
      names = mark.args[0].split(",")
      values = getattr(value, "values", value if len(names) > 1 else (value,))
      found |= dict(zip(names, values, strict=True))
    yield found


def noted(module: Any, name: str, run: Callable[[], Any], answer: Any = None) -> Errors:
  """What `run` compares by the function `name` of the module, which gives `answer`."""
  errors = Errors()

  def note(*arguments: Any) -> Any:
    errors.note(*arguments)
    return answer

  with mock.patch.object(module, name, note):
    run()
  return errors


def of_xl() -> Iterator[tuple[str, Errors]]:
  """Transformer-XL's files, whose tests return errors."""
  for names, find in (
    (test_transformer_xl.FILES, test_transformer_xl.errors),
    (test_models.TORCH, test_models.torch_errors),
    (test_models.TENSORFLOW, test_models.tf_errors),
  ):
    for name in names:
      errors = Errors()
      with precision("float64"):
        found = find(name)
      errors.worst, errors.arrays = max(found.values()), len(found)
      yield f"xl/{name}", errors


def of_compressive() -> Iterator[tuple[str, Errors]]:
  """Files of the Compressive Transformer."""
  whole = test_compressive
  tests = [(n, whole.test_algorithm_1) for n in whole.ALGORITHM]
  tests += [(n, whole.test_the_authors_code) for n in whole.AUTHORS]
  for name, test in tests:
    yield name, noted(whole, "close", lambda n=name, t=test: t(n))
  parts = {
    "d_compression_functions": (
      test_compress.test_neighbours,
      test_compress.test_the_gradient_of_a_convolution,
      test_compress.test_dilated_convolutions,
    ),
    "d_losses": (test_compress.test_losses,),
    "d_fifo_and_buckets": (test_compress.test_buckets,),
  }
  for name, own in parts.items():

    def run(own=own):
      for test in own:
        for arguments in calls(test):
          test(**arguments)

    yield name, noted(test_compress, "close", run)


def of_grc() -> Iterator[tuple[str, Errors]]:
  """Files of the gated recurrent cache."""
  for name in test_grc_golden.CASES:
    test = test_grc_golden.test_the_authors_layer
    run = lambda n=name, t=test: t(n)
    yield f"grc/{name}", noted(test_grc_golden, "assert_close", run)


def of_performers() -> Iterator[tuple[str, Errors]]:
  """Files of other Performers: what is compared with their numbers in float32."""
  own = test_favor_golden
  files = {
    "performer_pytorch": (
      own.test_features_of_performer_pytorch,
      own.test_attention_of_the_features_of_performer_pytorch,
      own.test_causal_attention_of_the_features_of_performer_pytorch,
    ),
    "t2t_token_performer": (own.test_token_performer,),
  }
  for name, tests in files.items():
    yield name, noted(own, "assert_close", lambda tests=tests: [t() for t in tests])


def of_lra() -> Iterator[tuple[str, Errors]]:
  """Files of the Long Range Arena: layers and functions, then whole models."""
  own, models = test_attentions_golden, test_lra_golden
  tests = {
    "lra_attn_longformer": [
      lambda rows=rows: own.test_longformer_without_global_tokens(rows)
      for rows in ([0], [0, 1])
    ],
    "lra_attn_bigbird": [own.test_bigbird_with_the_published_graph],
    "lra_fn_bigbird": [own.test_bigbird_s_published_function],
    "lra_fn_linear": [own.test_linear_attention_of_the_published_function],
    "clean_local_divisible": [own.test_local_is_the_corrected_code],
    "clean_synthesizer_dense_only": [own.test_dense_synthesizer_is_the_corrected_code],
    "clean_sinkhorn_sinkhorn": [
      *(
        lambda c=c: own.test_sinkhorn_is_the_corrected_code(c) for c in ("joint", "sum")
      ),
      own.test_permutations_are_those_of_the_published_operator,
    ],
  }
  for arguments in calls(own.test_the_fixed_pattern):
    test = lambda a=arguments: own.test_the_fixed_pattern(**a)
    tests[arguments["name"]] = [test]
  for name in own.FILES:
    tests[name] = [lambda n=name: own.test_published_code_where_it_is_right(n)]
  for name, runs in tests.items():
    run = lambda runs=runs: [test() for test in runs]
    yield f"lra/{name}", noted(own, "error", run, 0.0)
  for name, case in models.CASES.items():
    run = lambda n=name, c=case: models.compare(n, c)
    yield f"lra/lra_model_{name}", noted(models, "near", run, True)
  name, case = models.SOFTMAX
  run = lambda: models.compare_as_published(name, case)
  yield f"lra/lra_model_{name}", noted(models, "near", run, True)
  run = models.test_the_mean_is_over_real_tokens_alone
  yield "lra/lra_model_transformer_mean_learnpos", noted(models, "near", run, True)


def main() -> None:
  """Prints markdown rows as they are found."""
  about = describe()
  print(
    f"`python -m tests.parity`, commit {about['commit']}, {about['processor']}, Python "
    f"{about['python']}, JAX {about['jax']}:\n"
  )
  print("| file of `tests/golden` | worst error |\n|---|---|")
  for name, errors in itertools.chain(
    of_xl(), of_compressive(), of_grc(), of_performers(), of_lra()
  ):
    assert errors.arrays, name
    print(f"| `{name}` | {errors.worst:.1e} |")
    sys.stdout.flush()


if __name__ == "__main__":
  main()
