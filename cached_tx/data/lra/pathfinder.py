"""Pathfinder: are two discs joined by a dashed contour?

Made here (`contours`), or read from the folders of the published archive, whose layout
is

    curv_contour_length_14/metadata/<n>.npy      text in spite of the name: a line per
                                                 image, columns separated by spaces:
                                                 folder, file, number, label, ...
    curv_contour_length_14/imgs/<n>/sample_<k>.png

A row is the image, line by line: pixel values are ids, and 0, black, is one of them.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from cached_tx.data.lra import contours
from cached_tx.data.lra.base import Example, Options, Task
from cached_tx.data.lra.parallel import in_order
from cached_tx.data.sources.base import SPLITS

log = logging.getLogger(__name__)

TOTAL = 200_000  # images of a task
FOLDERS = {
  "hard": "curv_contour_length_14",
  "intermediate": "curv_contour_length_9",
  "easy": "curv_baseline",
}
# It is so in the archive as it was published.
KNOWN_EMPTY = "/curv_baseline/imgs/0/sample_172.png"


def _shares(total: int) -> dict[str, int]:
  """The first 80 per cent, the next 10, and the rest."""
  first, second = total * 8 // 10, total * 9 // 10
  return dict(zip(SPLITS, (first, second - first, total - second), strict=True))


def _split(examples: Iterator[Example], total: int) -> dict[str, Iterable[Example]]:
  """Cuts one sequence into the splits, which are read one after the other."""
  return {split: islice(examples, count) for split, count in _shares(total).items()}


def _block(size: int, difficulty: str, seed: int, job: tuple[int, int]) -> tuple:
  """The first images of a block: pixels and labels. The job: which, and how many."""
  number, count = job
  pixels = np.empty((count, size * size), np.uint8)
  labels = np.empty(count, np.int64)
  done = 0
  for part in contours.block(size, difficulty, seed, number):
    some = slice(done, min(done + len(part.labels), count))
    here = some.stop - done
    pixels[some] = part.pixels[:here].reshape(here, -1)
    labels[some] = part.labels[:here]
    done = some.stop
    if done == count:
      break
  return pixels, labels


def generated(
  size: int, difficulty: str, options: Options, total: int = TOTAL
) -> Iterator[Example]:
  """Yields `total` images: a function of size, difficulty and seed alone."""
  make = partial(_block, size, difficulty, options.seed)
  jobs = (
    (begin // contours.BLOCK, min(contours.BLOCK, total - begin))
    for begin in range(0, total, contours.BLOCK)
  )
  for pixels, labels in in_order(make, jobs, options.processes):
    for row, label in zip(pixels, labels, strict=True):
      yield Example((row,), int(label))


def _made(
  size: int, difficulty: str, total: int, options: Options
) -> dict[str, Iterable[Example]]:
  return _split(generated(size, difficulty, options, total), total)


def read_png(file: Path, size: int, where: str) -> np.ndarray:
  """The pixels of a grey image of `size` x `size`, line by line.

  Raises:
    ValueError: naming the file and `where` it is listed.
  """
  from PIL import Image

  if not file.is_file():
    raise ValueError(f"{file} is missing: {where} lists it")
  if not file.stat().st_size:
    raise ValueError(f"{file} is an empty file: {where} lists it")
  try:
    with Image.open(file, formats=("PNG",)) as image:
      kind = (image.mode, *image.size)
      pixels = np.asarray(image) if kind == ("L", size, size) else None
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise ValueError(f"{file} is no whole PNG image ({error}): {where}") from error
  if pixels is None:
    raise ValueError(
      f"{file} has mode {kind[0]} and {kind[1]} x {kind[2]} pixels, not 8 bits of grey "
      f"and {size} x {size}: {where}"
    )
  return pixels.reshape(-1)


class _Listed:
  """The images that the metadata of a folder list, in order."""

  def __init__(self, folder: Path, size: int):
    self.folder, self.size = folder, size
    self.lines: list[tuple[Path, int, str]] = []  # image, label, where it is listed
    self.known: set[Path] = set()
    files = list((folder / "metadata").glob("*.npy"))
    strange = [file for file in files if not file.stem.isdecimal()]
    if strange:
      raise ValueError(f"{strange[0]}: metadata files have a number for a name")
    for file in sorted(files, key=lambda file: int(file.stem)):
      self._read(file)
    if not self.lines:
      raise ValueError(f"{folder / 'metadata'} lists no image")

  def _read(self, file: Path):
    data = file.read_bytes()
    if data.startswith(b"\x93NUMPY"):
      raise ValueError(f"{file} is a NumPy array; those of the archive are text")
    lines = data.decode("utf-8", "replace").split("\n")
    if lines[-1]:
      raise ValueError(
        f"{file}, line {len(lines)}: the line is cut off: {lines[-1][-40:]!r}"
      )
    for number, line in enumerate(lines[:-1], 1):
      self._line(line, f"{file}, line {number}")

  def _line(self, line: str, where: str):
    columns = line.split()
    if len(columns) < 4:
      raise ValueError(
        f"{where}: {len(columns)} columns; folder, file, number, label and more"
      )
    folder, name, _, label = columns[:4]
    if label not in ("0", "1"):
      raise ValueError(f"{where}: label {label[:40]!r}; 0 or 1")
    image = self.folder / folder / name
    if not image.resolve().is_relative_to(self.folder.resolve()):
      raise ValueError(f"{where}: {folder}/{name} is outside of {self.folder}")
    if image in self.known:
      raise ValueError(f"{where}: {folder}/{name} was listed before")
    self.known.add(image)
    if self._known_empty(image):
      log.warning("%s is left out: it is an empty file in the archive", image)
      return
    self.lines.append((image, int(label), where))

  def _known_empty(self, image: Path) -> bool:
    """Whether it is the archive's one empty file, wherever the archive lies."""
    known = self.size == 32 and image.as_posix().endswith(KNOWN_EMPTY)
    return known and image.is_file() and not image.stat().st_size

  def examples(self) -> Iterator[Example]:
    """Reads the images."""
    for image, label, where in self.lines:
      yield Example((read_png(image, self.size, where),), label)


def _archive(size: int, options: Options) -> dict[str, Iterable[Example]]:
  assert options.source is not None
  folder = options.source.absolute()
  if folder.name not in FOLDERS.values():
    folder = folder / FOLDERS["hard"]
  if not (folder / "metadata").is_dir():
    raise FileNotFoundError(
      f"{folder / 'metadata'} is missing: --source is the folder pathfinder{size} of "
      f"the archive, or one of its folders {', '.join(FOLDERS.values())}, with "
      "metadata and imgs"
    )
  listed = _Listed(folder, size)
  return _split(listed.examples(), len(listed.lines))


def task(size: int, difficulty: str = "hard", total: int = TOTAL) -> Task:
  """A task of images that are made; "hard" is the benchmark's, and has no suffix."""
  return Task(
    name=f"pathfinder{size}" + ("" if difficulty == "hard" else f"_{difficulty}"),
    vocab=256,
    classes=2,
    length=size * size,
    source=f"made here, seeded: contours of {contours.LENGTHS[difficulty]} paddles",
    splits=partial(_made, size, difficulty, total),
    seeded=True,
  )


def archive(size: int) -> Task:
  """The task of the images of the published archive: the hard ones if not said."""
  return task(size)._replace(
    name=f"pathfinder{size}_archive",
    source=f"the folder pathfinder{size} of the published archive (hard), or a folder "
    f"in it ({', '.join(FOLDERS.values())}): "
    "https://storage.googleapis.com/long-range-arena/lra_release.gz",
    splits=partial(_archive, size),
    needs=True,
    seeded=False,
    official=_shares(TOTAL),
  )


PATHFINDERS = (
  *(task(size, name) for size in contours.RULES for name in FOLDERS),
  *(archive(size) for size in contours.RULES),
)
