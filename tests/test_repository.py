"""What the files of the repository must agree on, and what they must not name."""

import re
import subprocess
import sys
from pathlib import Path

import cached_tx

ROOT = Path(__file__).parents[1]

# A path that starts here, not in the middle of another. One letter stands in brackets,
# or this file would name what it looks for.
START = r"(?<![\w.])"
FORBIDDEN = (
  START + r"/(?:roo[t]|hom[e]/\w+|User[s]/\w+)/",
  r"--(?:extra-)?inde[x]-url",
  r"--truste[d]-host",
  r"pyp[i]\.org",
  r"pythonhoste[d]\.org",
)


def tracked() -> list[Path]:
  """The files that git knows; in a copy without git, all outside hidden folders."""
  if (ROOT / ".git").exists():
    listed = subprocess.run(
      ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    files = [ROOT / name for name in listed if name]
  else:
    skipped = {"runs", "build", "dist"}
    files = [
      path
      for folder in ROOT.iterdir()
      if folder.name not in skipped and not folder.name.startswith(".")
      for path in ([folder] if folder.is_file() else folder.rglob("*"))
      if "__pycache__" not in path.parts
    ]
  return [path for path in files if path.is_file()]


def forbidden(text: str) -> list[str]:
  """What a text names of one machine or of a package index."""
  here = [START + re.escape(f"{folder}/") for folder in {ROOT, Path.home()}]
  patterns = [*FORBIDDEN, *(p for p in here if p != START + "//")]
  return [match.group() for p in patterns for match in re.finditer(p, text)]


def test_setup_and_changelog_state_the_version_of_the_package():
  command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--version"]
  stated = subprocess.run(
    command, cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout.split()[-1]
  assert stated == cached_tx.__version__

  changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  newest = re.search(r"^## .*?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
  assert newest, "no heading of CHANGELOG.md has a version"
  assert newest.group(1) == cached_tx.__version__


def test_the_search_finds_what_it_is_for():
  assert forbidden("cd " + "/".join(["", "root", "project"]))
  assert forbidden(f"pip install {'-' * 2}index-url=somewhere")
  assert not forbidden("see https://example.com/home/index/ and ../home/me/file")


def test_no_file_names_a_machine_or_a_package_index():
  wrong = []
  for path in tracked():
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
      continue  # binary
    wrong += [f"{path.relative_to(ROOT)}: {found}" for found in forbidden(text)]
  assert not wrong, "\n".join(wrong)
