"""What a number was measured on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]


def _git(*words: str) -> str:
  done = subprocess.run(
    ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
  )
  return done.stdout.strip()


def commit() -> str:
  """The commit of the tree."""
  return _git("rev-parse", "--short", "HEAD")


def program() -> str:
  """What decides a result: the contents of cached_tx/ and of configs/compare.py.

  Raises:
    SystemExit: they differ from the commit, so that no name says what they are.
  """
  parts = ("cached_tx", "configs/compare.py")
  changed = _git("diff", "--name-only", "HEAD", "--", *parts)
  if changed:
    raise SystemExit(f"commit first, or a number has no program to name: {changed}")
  return "-".join(_git("rev-parse", f"HEAD:{part}")[:8] for part in parts)


def describe() -> dict[str, Any]:
  """Hardware, versions and commit, as JSON data."""
  model = platform.processor()
  info = Path("/proc/cpuinfo")
  if info.exists():
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
    model = names[0].partition(":")[2].strip() if names else model
  return {
    "commit": commit(),
    "program": program(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    "processor": model,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }
