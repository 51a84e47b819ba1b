"""The command line, as people meet it."""

import json
import shutil
import subprocess
import sys
import time

import pytest

import cached_tx
from cached_tx import main
from cached_tx.data.recall import TASKS
from cached_tx.recall import MEMORIES
from cached_tx.train.loop import Result
from configs.quickstart import get_config
from tests.trained import tiny, workdir

# ml_collections loads a config file in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ALONE = "--distributed=off"  # this process has used its devices already
CONFIG = "--config=configs/quickstart.py:smoke"


@pytest.fixture
def command(capfdbinary, monkeypatch):
  """Runs a command in this process: exit status, stdout, stderr."""
  monkeypatch.chdir(main.Path(main.__file__).parents[1])

  def call(*arguments):
    capfdbinary.readouterr()  # of a run that was trained for the test
    with pytest.raises(SystemExit) as ended:
      main.run(["cached-tx", *map(str, arguments)])
    sys.stdout.flush()
    out, err = capfdbinary.readouterr()
    return ended.value.code or 0, out.decode(errors="replace"), err.decode()

  return call


def test_help(command):
  for arguments in (["--help"], ["-h"], ["help"]):
    status, out, _ = command(*arguments)
    assert status == 0 and all(f"  {name} " in out for name in main.COMMANDS)
  assert command()[0] == 2
  status, out, err = command("trian")
  assert status == 2 and "no command 'trian'; did you mean train?" in err and not out
  assert command("--version")[:2] == (0, f"{cached_tx.__version__}\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command(command, name):
  status, out, _ = command(name, "--help")
  assert status == 0 and "\n  --workdir\n" in out
  assert max(map(len, out.splitlines())) <= 88
  assert ("\n  --top_p\n" in out) == (name == "generate")


@pytest.mark.parametrize(
  "arguments,said",
  [
    ("train", "--config is required"),
    (f"train {CONFIG}", "--workdir is required"),
    (f"train {CONFIG} --config.model.widht=3", "no key widht; did you mean width?"),
    (f"train {CONFIG} --config.modle.width=3", "no key modle; did you mean model?"),
    (f"train {CONFIG} --config.model.zzz=3", "no key zzz"),
    (
      f"train {CONFIG} --config.model.width=wide",
      "width is 'wide'; it must be a whole",
    ),
    (f"train {CONFIG} --config.model.width=a:b", "width is 'a:b'; it must be"),
    (
      f"train {CONFIG} --config.optimizer.peak=high",
      "peak is 'high'; it must be a num",
    ),
    (f"train {CONFIG} --config.data=web_en", "data is 'web_en'; it is a section"),
    (f"train {CONFIG} --config.model.heads=5 --workdir=x {ALONE}", "model.heads is 5"),
    ("train --config=configs/nope.py", "cannot be read: [Errno 2]"),
    (
      "train --config=configs/quickstart.py:tiny",
      "train: --config configs/quickstart.py:tiny: unknown mode 'tiny': full or smoke",
    ),
    (f"train {CONFIG} --report=maybe", "--report is 'maybe'; it must be true or false"),
    ("train --config.steps=3", "Unknown command line flag 'config.steps'"),
    ("generate --workdir=/nowhere", "has no config.json: train there first"),
    ("generate --workdri=/nowhere", "Did you mean: workdir"),
    ("generate --workdir=x --prompt=a --prompt_file=b", "cannot both be given"),
    (
      "generate --workdir=x --prompt_file=/nowhere",
      "--prompt_file is '/nowhere'; there",
    ),
    ("generate --workdir=x --load-state=/nowhere", "--load_state is '/nowhere'; there"),
    ("generate --workdir=x --save-state=/nowhere/s", "x has no config.json"),
    ("generate --workdir=x --tokens=0", "nothing would keep what was read"),
    ("generate --top_p=3", "is '3'; it must be a number in the range"),
    ("generate --tokens=many", "--tokens is 'many'; it must be a whole number"),
    ("evaluate --workdir=x --split=exam", "it must be one of train, validation, test"),
    ("evaluate --workdir=/nowhere", "has no config.json"),
    ("evaluate x", "what is 'x'?"),
    ("analyse", "--workdir is required"),
    ("analyse --workdir=/nowhere", "has no config.json"),
    ("analyse --workdir=x --memory=kept", "Unknown command line flag 'memory'"),
    ("recall", "--workdir is required"),
    ("recall --workdir=x --tasks=reading", "tasks are ['reading']: one or more of"),
    ("recall --workdir=x --kinds=xl,lstm", "kinds are ['xl', 'lstm']: one or more of"),
    ("recall --workdir=x --steps=0", "--steps"),
    ("inspect", "give --config or --workdir"),
    (f"convert {CONFIG} --workdir=x", "--weights is required"),
    (f"convert {CONFIG} --workdir=x --weights=w.pt", "w.pt is neither .safetensors"),
  ],
)
def test_mistakes_are_one_clear_line(command, arguments, said, tmp_path, monkeypatch):
  status, out, err = command(*arguments.split())
  assert status == 1 and not out
  assert err.startswith(f"cached-tx {arguments.split()[0]}: ") and said in err
  assert err.count("\n") == 1 and "Traceback" not in err
  assert not main.Path("x").exists()


def test_errors_can_be_looked_into():
  with pytest.raises(ValueError, match="--config is required"):
    main.run(["cached-tx", "train", "--debug_errors"])


def test_generate(command, tmp_path):
  (tmp_path / "prompt").write_bytes(b"In the")
  own = ["generate", f"--workdir={workdir()}", "--tokens=24"]
  status, text, err = command(*own, "--prompt=In the", "--seed=1")
  assert (status, err) == (0, "") and text
  assert command(*own, f"--prompt_file={tmp_path / 'prompt'}", "--seed=1")[1] == text
  assert command(*own, "--prompt=In the", "--seed=2")[1] != text


def test_a_document_is_read_once_and_asked_often(command, tmp_path):
  own = ["generate", f"--workdir={workdir()}", "--seed=5"]
  saved = tmp_path / "document"
  _, whole, _ = command(*own, "--prompt=In the", "--tokens=24")
  assert command(*own, "--prompt=In the", "--tokens=0", f"--save-state={saved}") == (
    *(0, ""),
    "cached-tx generate: 6 bytes read, 0 tokens sampled; what is remembered of them is "
    f"in {saved}, for --load-state\n",
  )
  for _ in range(2):
    assert command(*own, f"--load-state={saved}", "--tokens=24")[1] == whole
  later = tmp_path / "later"
  start = command(*own, f"--load_state={saved}", "--tokens=9", f"--save_state={later}")
  end = command(*own, f"--load-state={later}", "--tokens=15")
  assert start[1] + end[1] == whole
  _, asked, _ = command(*own, "--prompt=In the beginning", "--tokens=24")
  got = command(*own, f"--load_state={saved}", "--prompt= beginning", "--tokens=24")
  assert got[1] == asked
  status, out, err = command(*own, f"--load-state={saved}", "--step=2")
  assert (status, out) == (1, "") and "other weights" in err
  status, _, err = command(*own, "--tokens=0", f"--save-state={tmp_path}/no/state")
  assert status == 1 and "no folder" in err
  with saved.open("r+b") as file:
    file.seek(-1, 2)
    byte = file.read(1)[0]
    file.seek(-1, 2)
    file.write(bytes([byte ^ 1]))
  status, _, err = command(*own, f"--load-state={saved}")
  assert status == 1 and "changed since it was written" in err


def test_evaluate(command, tmp_path):
  path = tmp_path / "found.json"
  status, text, _ = command(
    *("evaluate", f"--workdir={workdir()}", "--rows=4", "--segments=3", "--step=2"),
    *("--memory=kept,zeroed", "--set=memory.size=16", "--set", "segment=16"),
    f"--json={path}",
  )
  found = json.loads(path.read_text())
  assert status == 0 and found["step"] == 2 and found["set"][1] == "segment=16"
  assert list(found["scores"]) == ["kept", "zeroed"]
  assert f"{found['scores']['zeroed']['bits_per_byte']:.4f}" in text


def test_analyse(command, tmp_path):
  folder = shutil.copytree(workdir(), tmp_path / "run")
  path = tmp_path / "found.json"
  status, text, _ = command(
    *("analyse", f"--workdir={folder}", "--rows=2", "--segments=6", "--step=2"),
    *("--set=memory.size=16", "--full", f"--json={path}"),
  )
  found = json.loads(path.read_text())
  assert status == 0 and found["step"] == 2 and found["full"]
  assert found["plot"] == str(folder / "attention.png")
  assert f"{100 * found['groups'][0]['buckets'][-1]['mass']:.3f}" in text


def test_recall(command, tmp_path, monkeypatch):
  run = {"task": "mqar", "kind": "xl", "steps": 3, "accuracy": [1.0, 0.5], "reach": 0}
  run |= {"answers": 512, "parameters": 7, "seed": 4}
  found = {"runs": [run], "chance": 0.1, "segment": 16, "longest": 1, "plot": "p.png"}
  asked = []

  def fake(workdir, **options):
    asked.append((workdir, options))
    return found

  monkeypatch.setattr("cached_tx.recall.recall", fake)
  own = ["recall", "--workdir=a", "--tasks=mqar,copying", "--kinds=xl", "--steps=3"]
  path = tmp_path / "found.json"
  status, text, _ = command(*own, "--max-distance=1", "--seed=4", f"--json={path}")
  assert status == 0 and "xl" in text and "100  50  reaches 0 segments" in text
  assert json.loads(path.read_text()) == found
  assert command("recall", "--workdir=a")[0] == 0
  (_, given), (_, usual) = asked
  assert given == {
    "tasks": ["mqar", "copying"], "kinds": ["xl"], "steps": 3, "seed": 4, "longest": 1
  }  # fmt: skip
  assert usual["kinds"] == [*MEMORIES] and set(usual["tasks"]) <= set(TASKS)


def test_inspect(command, tmp_path):
  _, text, _ = command("inspect", f"--workdir={workdir()}", f"--json={tmp_path / 'a'}")
  found = json.loads((tmp_path / "a").read_text())
  assert f"{found['parameters']:,}" in text and found["segment"] == 8
  status, text, _ = command("inspect", CONFIG, "--config.model.width=64")
  assert status == 0 and "257 x 64" in text


def test_train_reports_when_it_has_finished(command, tmp_path, monkeypatch):
  calls = []
  finished = [False, True]
  monkeypatch.setattr("cached_tx.report.report", calls.append)
  state = type("State", (), {"step": 7})
  monkeypatch.setattr(
    "cached_tx.train.loop.train", lambda *_: Result(state, finished.pop(0), 7, 0)
  )
  folder = str(tmp_path)
  status, _, err = command("train", CONFIG, ALONE, f"--workdir={folder}")
  assert status == main.STOPPED == 143 and "after step 7 of 20" in err and not calls
  assert command("train", CONFIG, ALONE, f"--workdir={folder}")[0] == 0
  assert calls == [folder]


def flat(config, prefix=""):
  """Dotted keys and values."""
  found = {}
  for key, value in config.items():
    more = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
    found |= more or {prefix + key: value}
  return found


def test_train_again_only_reports(command, tmp_path, monkeypatch):
  folder = shutil.copytree(workdir(), tmp_path / "run")
  calls = []
  monkeypatch.setattr("cached_tx.report.report", calls.append)
  old, new = flat(get_config("smoke").to_dict()), flat(tiny().to_dict())
  changes = [f"--config.{key}={new[key]}" for key in new if new[key] != old[key]]
  own = [CONFIG, ALONE, *changes]
  status, out, err = command("train", *own, f"--workdir={folder}")
  assert status == 0 and "has all 4 steps: nothing to train" in out, err
  assert calls == [str(folder)]
  command("train", *own, f"--workdir={folder}", "--noreport")
  assert calls == [str(folder)]


def test_help_is_instant_and_needs_no_jax():
  program = (
    "import sys, cached_tx.main as m\n"
    "try: m.run(['cached-tx', '--help'])\n"
    "except SystemExit: sys.exit('jax' in sys.modules)"
  )
  began = time.monotonic()
  subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
  assert time.monotonic() - began < 3  # 0.15 s on a machine that does nothing else


def test_the_module_is_a_program():
  own = [sys.executable, "-m", "cached_tx.main"]
  done = subprocess.run([*own, "generate", "--top_k=x"], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert subprocess.run([*own, "nothing"], capture_output=True).returncode == 2
