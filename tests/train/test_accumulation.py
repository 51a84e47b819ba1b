"""How many steps make one update, and from when on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx.train.accumulation import stages
from cached_tx.train.optimizer import MAIN, make_optimizer

OPTIONS = dict(peak=0.1, muon=0.0, warmup=1, floor=0.0, decay=0.1, b1=0.9, b2=0.99)


def test_one_number_is_one_stage():
  assert stages(4, 20) == ((0, 20, 4),)
  assert stages(((0, 1), (60, 4)), 100) == ((0, 60, 1), (60, 40, 4))
  assert [s.updates for s in stages([[0, 2], [4, 3]], 10)] == [2, 2]


@pytest.mark.parametrize(
  "accumulate,message",
  [
    (0, "is 0; it counts steps"),
    (3, "is 3, which does not divide steps = 10"),
    (((0, 1), (4, 0)), "is 0; it counts steps"),
    (((0, 3), (4, 2)), "is 3, which does not divide the 4 steps from 0 to 4"),
    (((0, 1), (4, 4)), "is 4, which does not divide the 6 steps from 4 to 10"),
    (((1, 1),), "must begin with step 0"),
    (((0, 1), (4, 2), (4, 1)), "each later than the one before"),
    (((0, 1), (10, 2)), "earlier than the end, steps = 10"),
    (((0, 1.5),), "a whole number of steps, or pairs"),
    ((), "a whole number of steps, or pairs"),
    ((0, 1, 2), "a whole number of steps, or pairs"),
  ],
)
def test_stages_that_do_not_fit_are_refused(accumulate, message):
  with pytest.raises(ValueError, match=rf"(?s)optimizer\.accumulate .*{message}"):
    stages(accumulate, 10)


def test_updates_average_so_many_gradients_from_a_step_on():
  labels = {"kernel": MAIN}
  start = {"kernel": jnp.ones((2, 3))}
  draw = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float32)
  grads = [{"kernel": jnp.asarray(g)} for g in draw]

  def run(steps, accumulate, grads):
    optimizer = make_optimizer(
      labels, steps=steps, clip=0.5, accumulate=accumulate, **OPTIONS
    )
    state, params, seen = optimizer.init(start), start, []
    update = jax.jit(optimizer.update)
    for grad in grads:
      updates, state = update(grad, state, params)
      params = jax.tree.map(jnp.add, params, updates)
      seen.append(params["kernel"])
    return seen

  got = run(9, ((0, 1), (3, 2), (5, 4)), grads)
  means = [draw[0], draw[1], draw[2], draw[3:5].mean(axis=0), draw[5:].mean(axis=0)]
  want = run(5, 1, [{"kernel": jnp.asarray(g)} for g in means])
  for step, update in enumerate((0, 1, 2, 2, 3, 3, 3, 3, 4)):
    np.testing.assert_allclose(got[step], want[update], rtol=1e-6)
