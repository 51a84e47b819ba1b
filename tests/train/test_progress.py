"""The progress line, on a terminal and in a file."""

import io

import pytest
from rich.console import Console

from cached_tx.train.progress import Progress, duration


def test_live_line():
  out = io.StringIO()
  progress = Progress(10, 0, Console(file=out, force_terminal=True, width=120))
  progress.update(1, "3.0000 bits/byte")
  progress.speed = 12345.0
  progress.update(4, "2.5000 bits/byte")
  progress.note("saved")
  progress.close()
  text = out.getvalue()
  assert "4/10" in text and "2.5000 bits/byte  12,345 tokens/s" in text
  assert "left" in text and "saved" in text


def test_plain_lines_are_few():
  out = io.StringIO()
  progress = Progress(1000, 0, Console(file=out, width=120))
  for done in range(1, 1001):
    progress.update(done, "")
  progress.close()
  first, *others = out.getvalue().splitlines()
  assert first == "step 0/1000  compiling"
  assert others[0].startswith("step 1/1000")
  assert len(others) == 2  # the first and the last


@pytest.mark.parametrize(
  "seconds,text",
  [(4.4, "4s"), (185.0, "3m 05s"), (7800.0, "2h 10m"), (273600.0, "3d 04h")],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
