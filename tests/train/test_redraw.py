"""Random rows that are drawn anew while a model is trained, and afterwards are not."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.data import tokenize
from cached_tx.evaluate import evaluate
from cached_tx.generate import generate
from cached_tx.load import load
from cached_tx.models import last_step
from cached_tx.train import sharding
from cached_tx.train.config import check
from cached_tx.train.evaluation import Evaluator, Reading
from cached_tx.train.experiment import Experiment
from cached_tx.train.loop import train
from cached_tx.train.metrics import read_log
from cached_tx.types import Segment
from tests.kinds import some
from tests.train import toy

STEPS, EVERY, SCORED = 7, 3, 6  # an evaluation stands where a redraw does


def config(text):
  c = toy.get_config("favor").unlock()
  c.steps, c.data.path, c.model.layers = STEPS, str(text), 1
  c.memory.redraw = EVERY
  c.optimizer.warmup = 1
  c.eval.every, c.save.every, c.save.keep = SCORED, 2, 9
  c.batch = c.eval.batch = 8  # over eight devices
  return c.lock()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """(config, workdir, result) of one run."""
  folder = tmp_path_factory.mktemp("redraw")
  own = config(toy.write_text(folder / "text"))
  return own, folder / "run", train(own, folder / "run")


def scores(workdir):
  return [
    {k: r[k] for k in ("step", "loss", "grad_norm") if k in r}
    for r in read_log(workdir / "metrics.jsonl")
    if r["kind"] in ("train", "eval")
  ]


def test_the_last_step_is_the_one_before_the_count():
  assert [last_step(steps) for steps in range(4)] == [0, 0, 1, 2]


def test_a_redraw_compiles_nothing(ran):
  _, _, result = ran
  assert result.finished and result.recompilations == 0
  draws = np.asarray(result.state.memory[0].draw)
  np.testing.assert_array_equal(draws, np.full_like(draws, (STEPS - 1) // EVERY))


@pytest.mark.parametrize("step", some([2, SCORED], [2]))
def test_a_run_goes_on_across_a_redraw(ran, step, tmp_path):
  """Step 2 is followed by one of the same draw; the next two begin another."""
  own, workdir, result = ran
  shutil.copytree(workdir, tmp_path / "run")
  for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
    if int(path.name) > step:
      shutil.rmtree(path)
  again = train(own, tmp_path / "run")
  assert again.done == STEPS - step
  rng = lambda state: state.replace(rng=jax.random.key_data(state.rng))
  chex.assert_trees_all_equal(
    jax.device_get(rng(again.state)), jax.device_get(rng(result.state))
  )
  assert scores(tmp_path / "run") == scores(workdir)


def test_evaluation_has_the_draw_of_the_last_step(ran):
  own, workdir, _ = ran
  experiment = Experiment.of(workdir)
  params, steps = experiment.restore_params(workdir, SCORED)
  [line] = [r for r in read_log(workdir / "metrics.jsonl") if r["kind"] == "eval"]
  assert line["step"] == SCORED - 1 and steps == SCORED
  tokens = tokenize(experiment.documents("validation"), experiment.tokenizer)
  model = experiment.model
  with sharding.on(experiment.mesh):
    cut = dict(rows=own.eval.batch, segments=own.eval.segments)
    reading = Reading(model, tokens, mesh=experiment.mesh, **cut)
    evaluator = Evaluator(model, reading)
    loss = lambda steps: evaluator(params, steps=steps)["kept"].loss
    assert loss(steps) == loss(steps) == line["loss"]
    assert loss(SCORED - 1) == line["loss"]  # of the same draw
    others = [loss(0), loss(1), loss(SCORED + 1)]  # of the first and of the next draw
    assert evaluator._step._cache_size() == 1
    assert others[0] == others[1]
    assert min(abs(other - line["loss"]) for other in others) > 1e-5
    bound = Evaluator(model.after(steps), reading)(params)["kept"].loss
    assert bound == pytest.approx(line["loss"], rel=1e-6)
  reads = dict(split="validation", rows=own.eval.batch, segments=own.eval.segments)
  found = evaluate(workdir, step=SCORED, **reads)
  assert found["scores"]["kept"]["loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_what_is_loaded_has_the_draw_of_the_last_step(ran, tmp_path):
  _, workdir, _ = ran
  own = load(workdir, SCORED)
  assert own.model.step == SCORED - 1 and load(workdir).model.step == STEPS - 1
  ids = own.ids(b"a bad egg, a cab")
  tokens = jnp.asarray(ids)
  segment = Segment(tokens == own.tokenizer.bos)
  free = Experiment.of(workdir).model
  logits = lambda step: free.apply(
    {"params": own.params}, tokens, own.state, segment, step=step
  )[0]
  got, state = own(ids, own.state)
  np.testing.assert_allclose(got, logits(SCORED - 1), rtol=0, atol=1e-5)
  assert np.abs(got - logits(SCORED)).max() > 1e-3
  assert np.abs(got - logits(0)).max() > 1e-3
  np.testing.assert_array_equal(state[0].draw, [[(SCORED - 1) // EVERY]])
  own.save_state(tmp_path / "state", state)
  back, _ = load(workdir, SCORED).load_state(tmp_path / "state")
  chex.assert_trees_all_equal(back, state)
  greedy = dict(bos=own.tokenizer.bos, length=1, temperature=0.0)
  [sampled] = generate(own.model, own.params, ids, **greedy)
  want = np.asarray(got[0, -1]).copy()
  want[own.tokenizer.bos] = -np.inf
  assert sampled == want.argmax()


def test_models_without_redraws_are_themselves(ran):
  model = Experiment.of(ran[1], changes=["memory.redraw=0"]).model
  assert model.after(SCORED) is model


@pytest.mark.parametrize(
  "redraw,accumulate,fits",
  [
    (6, 3, True),
    (6, 12, False),  # in the middle of the first update
    (4, 3, False),
    (12, 4, True),
    (9, ((0, 1), (6, 3)), True),
    (8, ((0, 1), (6, 3)), False),
    (8, ((0, 1), (12, 12)), False),
    (20, ((0, 1), (20, 2)), True),
    (30, 12, True),  # never
  ],
)
def test_no_update_averages_two_draws(tmp_path, redraw, accumulate, fits):
  c = config(toy.write_text(tmp_path / "text")).unlock()
  c.steps, c.memory.redraw = 24, redraw
  with c.ignore_type():
    c.optimizer.accumulate = accumulate
  if fits:
    check(c.to_dict())
    return
  with pytest.raises(ValueError, match=r"memory.redraw is .* optimizer.accumulate"):
    check(c.to_dict())
