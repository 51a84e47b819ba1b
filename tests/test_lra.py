"""The Long Range Arena from the command line: data, runs, numbers, tables."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_tx import main
from cached_tx.data.lra import ClassEvaluation, examples, listops
from cached_tx.lra import published, table
from cached_tx.lra.config import check
from cached_tx.lra.evaluation import ClassEvaluator
from cached_tx.lra.experiment import LraExperiment
from cached_tx.lra.optimizer import schedule
from cached_tx.lra.training import evaluate, train
from cached_tx.train import sharding
from cached_tx.train.metrics import read_log
from configs import quickstart
from tests.models.test_encoder import config
from tests.outside import FOLDER

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Small prepared data of listops_small."""
  folder = tmp_path_factory.mktemp("lra")
  few = listops.SMALL._replace(sizes=(60, 10, 13))
  task = listops.LISTOPS_SMALL
  with pytest.MonkeyPatch.context() as patch:
    from cached_tx.data.lra import TASKS, prepare

    task = task._replace(splits=lambda options: listops._made(few, options), pinned={})
    patch.setitem(TASKS, "listops_small", task)
    prepare("listops_small", folder, processes=1)
  return folder


def toy(data, model="transformer", seed=0, steps=6, **changes):
  c = config("listops_small", f"{model},smoke").unlock()
  c.seed, c.steps, c.task.path, c.task.length = seed, steps, str(data), 24
  c.eval.examples, c.model.dropout = 0, 0.1
  c.batch = c.eval.batch = 8  # rows for as many devices
  for key, value in changes.items():
    c[key] = value
  return c.lock()


def losses(workdir):
  log = read_log(workdir / "metrics.jsonl")
  return [(r["step"], r["loss"]) for r in log if r["kind"] == "train"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """A finished run with caches."""
  workdir = tmp_path_factory.mktemp("run")
  result = train(toy(data, "transformer,cached"), workdir)
  assert result.finished and result.recompilations == 0
  return workdir


def test_a_run_that_was_stopped_goes_on_to_the_last_bit(run, data, tmp_path):
  """Caches are in the checkpoint."""
  train(toy(data, "transformer,cached", steps=2), tmp_path)
  stored = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(stored | {"steps": 6}))
  train(toy(data, "transformer,cached"), tmp_path)
  assert losses(tmp_path) == losses(run)


def test_the_number_is_of_all_of_the_test_split(run, data):
  found = evaluate(run)
  assert found["examples"] == 13 and found["split"] == "test" and found["cached"]
  assert json.loads((run / "result.json").read_text()) == found
  experiment = LraExperiment.of(run)
  params, memory, chosen = experiment.restore(run)
  assert chosen.step == found["step"] and any(own.filled.all() for own in memory)
  rows = examples("listops_small", "test", data)
  right = 0
  model = jax.jit(lambda t, m: experiment.model.apply({"params": params}, t, m, memory))
  for batch in ClassEvaluation(rows, rows=1, length=24):
    logits, _ = model(batch.tokens, batch.mask)
    right += int(np.argmax(logits[0]) == batch.labels[0])
  assert found["accuracy"] == right / 13
  labels = [e.label for e in rows]
  assert found["majority"] == max(map(labels.count, labels)) / 13


def test_an_unfinished_run_has_no_result(data, tmp_path):
  """Nor does one that was evaluated at a step that was named."""
  train(toy(data, "transformer", steps=2), tmp_path)
  stored = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(stored | {"steps": 6}))
  found = evaluate(tmp_path)
  assert (found["trained"], found["steps"]) == (2, 6)
  assert not (tmp_path / "result.json").exists()
  (tmp_path / "config.json").write_text(json.dumps(stored))
  assert evaluate(tmp_path, step=2)["chosen"] == "step"
  assert not (tmp_path / "result.json").exists()
  assert evaluate(tmp_path)["chosen"] == "validation"
  assert (tmp_path / "result.json").exists()


def test_the_last_step_is_scored(data, tmp_path):
  """Where eval.every does not meet it; without scores the newest is taken."""
  config = toy(data, "linear", steps=3)
  train(config, tmp_path / "scored")
  scored = read_log(tmp_path / "scored" / "metrics.jsonl")
  assert any(r.get("kind") == "eval" and r["step"] == 2 for r in scored), scored
  config.unlock().eval.every = 0
  train(config, tmp_path / "bare")
  assert evaluate(tmp_path / "bare")["chosen"] == "newest"


def test_seeds_draw_other_features(data):
  """An option of the attention comes before the run's seed."""

  def rows(seed, own):
    config = toy(data, "performer", seed=seed, attention=own)
    return np.asarray(LraExperiment(config).model.attentions()[0].draw())

  assert np.abs(rows(0, {}) - rows(1, {})).max() > 0.1
  np.testing.assert_array_equal(rows(0, {"seed": 3}), rows(1, {"seed": 3}))


def test_devices_change_no_number(run, data):
  experiment = LraExperiment.of(run)
  params, memory, _ = experiment.restore(run)
  rows = examples("listops_small", "validation", data)
  scores = []
  for sizes in ((8, 1, 1, 1), (1, 2, 2, 2)):
    mesh = sharding.make_mesh(*sizes)
    with sharding.on(mesh):
      own = ClassEvaluator(experiment.model, rows, mesh=mesh, rows=8, length=24)
      scores.append(own(*jax.device_get((params, memory))))
  np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_commands(data, tmp_path, capsys, monkeypatch):
  def ask(*words):
    with pytest.raises(SystemExit) as end:
      main.run(["cached-tx", *map(str, words)])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err

  code, out, _ = ask("lra", "list")
  assert code == 0 and "listops" in out and "bigbird" in out
  assert ask("lra")[0] == 2 and "prepare" in ask("lra", "--help")[1]
  code, _, err = ask("lra", "tables")
  assert code == 2 and "did you mean table" in err
  code, _, err = ask("lra", "prepare", "--task", "text", "--out", tmp_path)
  assert code == 1 and "--source" in err
  path = config.__globals__["FOLDER"] / "listops_small.py"
  work = tmp_path / "runs" / "one"
  flags = [f"--config.task.path={data}", "--config.task.length=24", "--workdir", work]
  flags += ["--config.batch=8", "--config.eval.batch=8", "--distributed=off"]
  code, out, _ = ask("lra", "train", "--config", f"{path}:linear,smoke", *flags)
  assert code == 0 and "13 examples (test)" in out
  reformer = ["lra", "train", "--config", f"{path}:reformer,smoke", *flags]
  code, _, err = ask(*reformer, "--config.attention.hashes=two")
  assert code == 1 and "attention.hashes is 'two'; it is a whole number" in err
  code, _, err = ask(*reformer, "--config.attention.window=2")
  assert code == 1 and "attention.window is no option of reformer" in err
  code, _, err = ask(*reformer, "--config.stepz=2")
  assert code == 1 and "config key stepz does not exist" in err
  code, out, _ = ask("lra", "evaluate", "--workdir", work, "--split", "validation")
  assert code == 0 and "10 examples (validation)" in out
  code, out, _ = ask("lra", "table", "--runs", tmp_path, "--out", tmp_path / "out")
  assert code == 0 and "| linear |" in out
  made = {p.name for p in (tmp_path / "out").iterdir()}
  assert made == {"accuracy.md", "accuracy.csv", "accuracy.png"}
  code, _, err = ask("lra", "table")
  assert code == 1 and "--runs or --efficiency" in err
  again = ["--workdir", tmp_path / "x", "--distributed=off"]
  code, _, err = ask("train", "--config", f"{path}:linear", *again)
  assert code == 1 and "cached-tx lra" in err


def test_a_second_run_of_the_same_seed_is_named(run, tmp_path):
  evaluate(run)
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    shutil.copy(run / "result.json", tmp_path / name)
  with pytest.raises(ValueError, match="are the same run"):
    table.summary(table.results(tmp_path))
  (tmp_path / "b" / "result.json").write_text("{}")
  with pytest.raises(ValueError, match=r"b/result\.json is no result"):
    table.results(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"no result\.json below"):
    table.results(tmp_path / "c")


RECORD = {
  "task": "listops", "model": "bigbird", "cached": True, "layers": 6, "length": 2000,
  "steps": 5000, "batch": 32, "majority": 0.166, "parameters": 9, "run": "there",
  "settings": "a", "data": "b", "options": {}, "selected_on_test": False,
}  # fmt: skip


def test_other_settings_or_data_are_other_rows():
  """Not seeds of one another; the row says which option differs."""
  narrow = RECORD | {"seed": 0, "accuracy": 0.3, "options": {"block": 16}}
  wide = RECORD | {"seed": 1, "accuracy": 0.4, "options": {}, "settings": "c"}
  other = narrow | {"data": "d", "accuracy": 0.5}
  rows = table.summary([narrow, wide, other])
  assert [row["seeds"] for row in rows] == [1, 1, 1]
  assert {row["options"] for row in rows} == {"block 16", "block as it is"}
  assert "bigbird + cache (block 16)" in table.as_markdown(rows)


def test_published_figures_stand_beside_what_they_are_of():
  """Table 6 has 6 layers; generated Pathfinder has other images."""
  ask = lambda **o: published.accuracy(RECORD | {"cached": False} | o)
  assert ask() == (36.06, True) and ask(cached=True) == (37.45, True)
  assert ask(layers=4) == (36.05, True) and ask(layers=4, cached=True) == (37.45, False)
  assert ask(layers=4, steps=300) == (36.05, False)
  assert ask(task="listops_archive", layers=4) == (36.05, True)
  assert ask(task="listops_small") == (None, False)
  images = {"layers": 4, "length": 1024, "steps": 62_400, "batch": 512}
  assert ask(task="pathfinder32", **images) == (None, False)
  assert ask(task="pathfinder32_archive", **images) == (74.87, True)
  assert ask(task="text_official", layers=4, steps=20_000, length=4000) == (64.02, True)
  assert ask(task="text", cached=True) == (None, False)


def test_the_table_of_all_tasks():
  tasks = ("listops", "text", "retrieval", "image", "pathfinder32_archive")
  own = {"cached": False, "seed": 0}
  runs = [RECORD | own | {"task": t, "accuracy": 0.1 * i} for i, t in enumerate(tasks)]
  longer = {"task": "text", "steps": 9000, "accuracy": 0.3}
  text = table.matrix(table.summary([*runs, RECORD | own | longer]))
  assert "| bigbird | 0.00 (36.06) | 30.00 (64.02) |" in text
  assert text.rstrip().endswith("| 24.00 |")
  few = table.matrix(table.summary(runs[:3]))
  assert few.rstrip().endswith("| - | - | - |")


def test_tables_have_means_spreads_and_published_numbers(tmp_path):
  runs = [RECORD | {"seed": s, "accuracy": 0.36 + 0.01 * s} for s in range(3)]
  bare = {"model": "transformer", "cached": False, "seed": 0, "accuracy": 0.35}
  bare |= {"layers": 4}
  runs.append(RECORD | bare)
  rows = table.summary(runs)
  assert [table.label(row) for row in rows] == ["transformer", "bigbird + cache"]
  assert rows[0]["spread"] is None and rows[0]["published"] == 36.37
  assert rows[1]["published"] == 37.45 and rows[1]["seeds"] == 3
  np.testing.assert_allclose((rows[1]["accuracy"], rows[1]["spread"]), (37, 1))
  assert (
    "| bigbird + cache | 9 | 2,000 | 5,000 x 32 | 3 | 37.00 ± 1.00 | 37.45 |"
    in table.as_markdown(rows)
  )
  speeds = [
    {"model": m, "cached": False, "length": n, "steps_per_second": s, "peak_bytes": b}
    | {"batch": 1}
    for m, n, s, b in (
      ("transformer", 1024, 2.0, 800), ("performer", 1024, 4.0, 200),
      ("transformer", 4096, 0.5, 8000), ("performer", 4096, 3.0, 800),
    )
  ]  # fmt: skip
  (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
  assert table.summary(table.results(tmp_path / "runs.jsonl")) == rows
  found = table.relative(speeds)
  last = found[-1]
  assert (last["model"], last["length"]) == ("performer", 4096)
  np.testing.assert_allclose((last["speedup"], last["memory"]), (6, 0.1))
  np.testing.assert_allclose(last["published_speedup"], 8.0 / 1.4)
  text = table.efficiency_markdown(found)
  assert "| performer | 2.00 (1.17) | 6.00 (5.71) | 0.25 (0.44) | 0.10 (0.11) |" in text
  speeds += [s | {"model": "bigbird", "cached": True} for s in speeds[:1]]
  written = {path.name for path in table.write(tmp_path, runs, speeds)}
  assert {"accuracy.csv", "efficiency.png", "tradeoff.png"} <= written
  assert len((tmp_path / "efficiency.csv").read_text().splitlines()) == 6


def test_published_averages_are_the_printed_ones():
  mean = lambda model: round(float(np.mean([*published.ACCURACY[model].values()])), 2)
  found = mean("transformer"), mean("performer"), mean("bigbird")
  assert found == (54.39, 51.41, 55.01)


@pytest.mark.parametrize(
  "name,options",
  [
    ("listops", ("rsqrt", 0.05, 1000, 5000)),
    ("text", ("rsqrt", 0.05, 8000, 20000)),
    ("cifar", ("cosine", 5e-4, 175, 35000)),
    ("pathfinder32", ("cosine", 1e-3, 312, 62400)),
  ],
)
def test_schedules_are_the_published_ones(name, options):
  with np.load(FOLDER / "lra" / "lra_schedules.npz") as z:
    got = schedule(*options)(jnp.asarray(z["steps"]))
    np.testing.assert_allclose(got, z[name], rtol=3e-6)


FAULTS = [
  ({"steps": 0}, "steps is 0"),
  ({"task.length": 0}, "task.length is 0"),
  ({"optimizer.schedule": "linear"}, "optimizer.schedule is 'linear'"),
  ({"optimizer.rate": 0.0}, "optimizer.rate is 0.0"),
  ({"eval.examples": -1}, "eval.examples is -1"),
  ({"model.nonsense": 1}, "model.nonsense does not exist"),
]


@pytest.mark.parametrize("change,text", FAULTS)
def test_a_config_that_cannot_be_run_is_refused(change, text, data):
  own = toy(data).to_dict()
  for key, value in change.items():
    section, _, name = key.rpartition(".")
    (own[section] if section else own)[name] = value
  with pytest.raises(ValueError, match=text):
    check(own)


def test_other_memories_and_configs_are_refused(data, tmp_path):
  c = toy(data).unlock()
  c.memory.kind = "xl"
  with pytest.raises(ValueError, match=r"memory\.kind is 'xl'"):
    _ = LraExperiment(c).model
  c = toy(data).unlock()
  c.task.name = "lists"
  with pytest.raises(ValueError, match="'lists' is unknown"):
    _ = LraExperiment(c).model
  with pytest.raises(ValueError, match="config key data does not exist"):
    check(quickstart.get_config().to_dict())
  with pytest.raises(FileNotFoundError, match="holds no run of cached-tx lra"):
    LraExperiment.of(tmp_path)
  assert "tensorflow" not in sys.modules
