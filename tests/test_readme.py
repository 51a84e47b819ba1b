"""What the README shows runs as it stands there."""

import re
import runpy
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_a_layer_in_ones_own_model(tmp_path):
  (code,) = [block for block in blocks("python") if "class Mine" in block]
  (tmp_path / "readme.py").write_text(code, encoding="utf-8")
  names = runpy.run_path(str(tmp_path / "readme.py"))
  assert names["y"].shape == (2, 16, 32)
  assert all(row.shape == (2,) for row in jax.tree.leaves(names["losses"]))
  assert names["state"].recent.valid.all()  # the memory is full after three segments
  y, stream, _ = names["layer"].apply(
    {"params": names["variables"]["params"]["SlotAttention_0"]},
    names["x"][:, :5],
    names["stream"],
    names["Segment"](names["segment"].starts[:, :5]),
  )
  assert y.shape == (2, 5, 32) and (stream.phase == 5).all()


def test_the_two_commands_come_first():
  first = blocks("bash")[0].split("\n")
  assert [line.partition("#")[0].strip() for line in first[:2]] == [
    "make train",
    "make test",
  ]


def test_every_command_exists():
  shown = {
    word
    for block in blocks("bash")
    for word in re.findall(r"bin/cached-tx (\w+)", block)
  }
  from cached_tx.main import COMMANDS

  assert shown <= set(COMMANDS)
