"""Image: CIFAR-10 in grey, pixel by pixel: Krizhevsky, 2009.

Read from the binary version, cifar-10-binary.tar.gz, unpacked: data_batch_1.bin to
data_batch_5.bin and test_batch.bin, each of 10,000 records of 3,073 bytes: the label,
then 1,024 bytes of red, of green and of blue, line by line. The validation split is the
last tenth of the training images, in the order of the files; the published one is the
last tenth in the order of TFDS.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cached_tx.data.lra.base import Example, Options, Task

RECORD = 1 + 3 * 1024
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)


def grey(
  red: UInt8[np.ndarray, "*rest"],
  green: UInt8[np.ndarray, "*rest"],
  blue: UInt8[np.ndarray, "*rest"],
) -> UInt8[np.ndarray, "*rest"]:
  """Brightness as `tf.image.rgb_to_grayscale` has it, from 8 bits to 8 bits.

  In float32, on values divided by 255: y = 0.2989 r + 0.5870 g + 0.1140 b; then 255.5 y
  without its fraction.
  """
  share = np.float32(1 / 255)
  r, g, b = (colour.astype(np.float32) * share for colour in (red, green, blue))
  y = np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b
  return (y * np.float32(255.5)).astype(np.uint8)


def read_batch(file: Path) -> Iterator[Example]:
  """The images of a file, in grey.

  Raises:
    ValueError: naming the file, and the record where there is one.
  """
  size = file.stat().st_size
  if size == 0 or size % RECORD:
    raise ValueError(
      f"{file} has {size} bytes; records have {RECORD}, so record {size // RECORD} is "
      "cut off"
    )
  with open(file, "rb") as data:
    for number in range(size // RECORD):
      record = np.frombuffer(data.read(RECORD), np.uint8)
      if len(record) != RECORD:
        raise ValueError(f"{file}, record {number}: the file became shorter")
      label = int(record[0])
      if label > 9:
        raise ValueError(f"{file}, record {number}: label {label}; 0 to 9")
      yield Example((grey(*record[1:].reshape(3, 1024)),), label)


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
  inner = folder / "cifar-10-batches-bin"
  files = [(inner if inner.is_dir() else folder) / name for name in names]
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(
        f"{file} is missing: --source is the folder cifar-10-batches-bin of "
        f"cifar-10-binary.tar.gz, with {', '.join(TRAIN + TEST)}"
      )
  return files


def _splits(options: Options) -> dict[str, Iterable[Example]]:
  assert options.source is not None
  train, test = (_files(options.source, names) for names in (TRAIN, TEST))
  count = sum(file.stat().st_size for file in train) // RECORD
  examples = (example for file in train for example in read_batch(file))
  return {
    "train": islice(examples, count * 9 // 10),
    "validation": examples,
    "test": (example for file in test for example in read_batch(file)),
  }


IMAGE = Task(
  name="image",
  vocab=256,
  classes=10,
  length=1024,
  source="the folder cifar-10-batches-bin of cifar-10-binary.tar.gz, "
  "https://www.cs.toronto.edu/~kriz/cifar.html",
  splits=_splits,
  needs=True,
  official={"train": 45_000, "validation": 5_000, "test": 10_000},
)
