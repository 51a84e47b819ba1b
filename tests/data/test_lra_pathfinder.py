"""Pathfinder: what is made, that labels cannot be told otherwise, and the archive."""

import hashlib
import logging
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from cached_tx.data.lra import TASKS, contours, pathfinder
from cached_tx.data.lra.base import Options
from cached_tx.data.lra.builder import prepare_task, read_examples
from cached_tx.data.lra.parallel import in_order

# Of the first 32 images of seed 0, pixels and labels.
PINNED = {
  (32, "hard"): "4e72f2dd27eb6980725cd95a77b28cfe1e51b405d99bc6bbec474185a79dd370",
  (64, "hard"): "a43cc6a75b4b873195d3dc0594899c29a02a3b137c72eb11f60944f186dfa419",
  (128, "hard"): "6c80f31786697b87f83c8399aabc6afae6fc5081720fd504c5a0a55ccc499df1",
  (256, "hard"): "38b2b9e845e972ca8dc2d25d7b661664ccb97ec6b1859c72ab96bcfea6fb8f7a",
  (32, "easy"): "a26a8f5b9a94d90d5f3d90f5ff11ea587ee35663570a1f92fd378c8339d12aeb",
}
FEW = 160  # scenes of a batch, where the numbers do not matter


def some(size, difficulty, number=0):
  """The first batch of a block, all of it."""
  rules, length = contours.RULES[size], contours.LENGTHS[difficulty]
  rng = contours._Numbers("test", size, difficulty, number)
  scenes, labels, discs = contours._batch(rules, length, rng)
  return rules, length, scenes, labels, discs


@pytest.mark.parametrize(("size", "difficulty"), PINNED)
def test_images_are_the_same_everywhere(monkeypatch, size, difficulty):
  if size > 32:
    monkeypatch.setattr(contours, "_SCENES", FEW)
  made = next(contours.block(size, difficulty, 0, 0))
  assert made.pixels.shape[1:] == (size, size)
  digest = hashlib.sha256(made.pixels[:32].tobytes() + made.labels[:32].tobytes())
  assert digest.hexdigest() == PINNED[size, difficulty]


@pytest.mark.parametrize("size", contours.RULES)
@pytest.mark.parametrize("difficulty", contours.LENGTHS)
def test_contours_keep_the_rules(monkeypatch, size, difficulty):
  monkeypatch.setattr(contours, "_SCENES", FEW)
  rules, length, scenes, labels, discs = some(size, difficulty)
  assert len(labels) >= 2
  ways = contours._directions()[:, scenes.turns]
  for n in range(min(8, len(labels))):
    margin = scenes.margins[n]
    there = np.flatnonzero(scenes.tails[0, n] != contours._AWAY)
    tails, way = scenes.tails[:, n].T, ways[:, n].T
    heads = tails + rules.paddle * way
    np.testing.assert_array_less(np.abs(np.linalg.norm(way, axis=1) - 1), 1e-6)
    for ends in (tails[there], heads[there]):
      assert (ends >= rules.padding + margin).all()
      assert (ends <= rules.size - rules.padding - margin).all()
    before = {i: i - 2 for i in range(2, 2 * length)}
    short = length // 3
    for i in there[there >= 2 * length]:
      if (i - 2 * length) % short:
        before[i] = i - 1
    for i, last in before.items():
      pivot = heads[last] + margin * way[last]
      np.testing.assert_allclose(tails[i] - margin * way[i], pivot, atol=1e-9)
      bend = np.arccos(np.clip(way[i] @ way[last], -1, 1))
      assert rules.continuity * bend < np.pi / 2 + 1e-6
    points = np.linspace(0, rules.paddle, 11)[:, None]
    along = {i: tails[i] + points * way[i] for i in there}
    for i, j in combinations(there, 2):
      if before.get(j) != i:
        near = np.linalg.norm(along[i][:, None] - along[j], axis=-1).min()
        assert near >= 2 * margin + rules.thickness - 1e-9
    # Which ends have a disc says the label.
    first = [np.allclose(discs[n, 0], tails[k]) for k in (0, 1)]
    last = [np.allclose(discs[n, 1], heads[2 * length - 2 + k]) for k in (0, 1)]
    assert (sum(first), sum(last)) == (1, 1)
    assert labels[n] == (first == last)
    apart = np.linalg.norm(tails[0] - tails[1])
    np.testing.assert_allclose(apart, rules.seed_distance, atol=1e-5)
  assert scenes.turns.shape[1] == 2 * length + rules.distractors // short * short


@pytest.mark.parametrize(("size", "difficulty"), [(32, "hard"), (32, "easy")])
def test_only_the_contours_tell_the_label(size, difficulty):
  parts = list(contours.block(size, difficulty, 1, 0))
  pixels = np.concatenate([part.pixels for part in parts]).astype(np.float64)
  labels = np.concatenate([part.labels for part in parts])
  discs = np.concatenate([part.discs for part in parts])
  assert len(labels) == contours.BLOCK
  # One of each label in a pair, in random order, at the same distance.
  assert (labels.reshape(-1, 2).sum(1) == 1).all()
  assert abs(labels[::2].mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels) / 2)
  distance = np.linalg.norm(discs[:, 0] - discs[:, 1], axis=1)
  assert np.abs(distance[::2] - distance[1::2]).max() <= contours._ALIKE
  for value in (
    pixels.mean((1, 2)),
    (pixels > 0).sum((1, 2)),
    distance,
    np.linalg.norm(discs[:, 0] - size / 2, axis=1),
    np.linalg.norm(discs[:, 1] - size / 2, axis=1),
  ):
    one, other = value[labels == 1], value[labels == 0]
    error = np.sqrt((one.var() + other.var()) / len(one))
    assert abs(one.mean() - other.mean()) < 4 * error
    assert abs(np.log(one.std() / other.std())) < 0.15
  half = len(labels) // 2
  right = logistic(pixels.reshape(len(labels), -1), labels, half)
  assert abs(right - 0.5) < 4 * 0.5 / np.sqrt(half)


def logistic(inputs, labels, train):
  """Accuracy, on the rest, of logistic regression on the first `train` rows."""
  inputs = (inputs - inputs[:train].mean(0)) / (inputs[:train].std(0) + 1)
  weights, bias = np.zeros(inputs.shape[1]), 0.0
  rate = 1 / (np.linalg.norm(inputs[:train], 2) ** 2 / 4 / train + 0.1)
  for _ in range(100):
    wrong = 1 / (1 + np.exp(-inputs[:train] @ weights - bias)) - labels[:train]
    weights -= rate * (inputs[:train].T @ wrong / train + 0.1 * weights)
    bias -= rate * wrong.mean()
  return ((inputs[train:] @ weights + bias > 0) == labels[train:]).mean()


def test_paddles_and_discs_are_drawn_as_they_cover_pixels():
  rules = contours.RULES[64]
  scenes = contours._Scenes(rules, np.array([1]), 2, contours._Numbers("x"))
  scenes.tails[:, 0, 0] = (20.3, 10.2)
  scenes.turns[0, 0] = 0  # to the right
  discs = np.array([[[50.0, 50.0], [40.3, 20.1]]])
  (image,) = contours._draw(scenes, slice(0, 1), 1, discs)
  fine = (np.arange(64 * 50) + 0.5) / 50
  bar = (np.abs(fine[:, None] - 20.3) < 0.5) & (np.abs(fine - 12.7) < 2.5)
  share = lambda drawn: drawn.reshape(64, 50, 64, 50).mean((1, 3))
  want = 0.8 * share(bar)
  np.testing.assert_allclose(image[:30] / 255, want[:30], atol=0.011)
  for down, right in discs[0]:
    far = (fine[:, None] - down) ** 2 + (fine - right) ** 2
    disc = share(far < rules.marker_radius**2)
    near = disc > 0
    assert np.abs(image / 255 - disc)[near].max() < 0.11  # worst measured: 0.08
  assert image.max() == 255


def test_blocks_follow_one_another(monkeypatch):
  monkeypatch.setattr(contours, "_SCENES", FEW)
  monkeypatch.setattr(contours, "BLOCK", 12)
  rows = list(pathfinder.generated(32, "easy", Options(seed=3), 30))
  assert len(rows) == 30 and rows[0].tokens[0].dtype == np.uint8
  part = next(contours.block(32, "easy", 3, 2))
  np.testing.assert_array_equal(rows[24].tokens[0], part.pixels[0].reshape(-1))
  assert [row.label for row in rows[24:]] == part.labels[:6].tolist()
  assert len({row.tokens[0].tobytes() for row in rows}) == 30
  other = next(pathfinder.generated(32, "easy", Options(seed=4), 1))
  assert (other.tokens[0] != rows[0].tokens[0]).any()


def test_work_of_processes_comes_in_order():
  want = [abs(i) for i in range(-9, 9)]
  assert list(in_order(abs, iter(range(-9, 9)), 1)) == want
  assert list(in_order(abs, iter(range(-9, 9)), 3)) == want
  started = in_order(abs, iter(range(10**9)), 2)
  assert [next(started) for _ in range(3)] == [0, 1, 2]
  started.close()


@pytest.mark.prove
def test_images_do_not_depend_on_the_number_of_processes():
  total = 2 * contours.BLOCK + 10
  one, two = (
    hashlib.sha256(
      b"".join(
        row.tokens[0].tobytes() + bytes([row.label])
        for row in pathfinder.generated(32, "hard", Options(processes=count), total)
      )
    ).hexdigest()
    for count in (1, 2)
  )
  assert one == two


def test_task_is_prepared_and_read(tmp_path, monkeypatch):
  monkeypatch.setattr(contours, "_SCENES", FEW)
  task = pathfinder.task(32, "easy", total=40)
  about = prepare_task(task, tmp_path, Options())
  assert [about[s]["examples"] for s in ("train", "validation", "test")] == [32, 4, 4]
  assert about["train"]["labels"] == [16, 16]
  train = read_examples(task, "train", tmp_path)
  want = list(pathfinder.generated(32, "easy", Options(), 40))
  for got, example in zip(train, want, strict=False):
    np.testing.assert_array_equal(got.tokens[0], example.tokens[0])
    assert got.label == example.label


def test_names():
  assert TASKS["pathfinder128"].length == 16384
  assert {"pathfinder32_easy", "pathfinder256_archive"} <= set(TASKS)


LINE = "imgs/{n} sample_{k}.png {k} {label} 1.0 14 4 2 0.5 1 1\n"


def write_archive(folder, files=("10", "9"), each=10, size=32):
  """A folder as in the archive; returns the images in the order of reading."""
  rng, images = np.random.default_rng(0), []
  (folder / "metadata").mkdir(parents=True)
  for n in sorted(files, key=int):
    (folder / "imgs" / n).mkdir(parents=True)
    lines = []
    for k in range(each):
      image = rng.integers(0, 256, (size, size), np.uint8)
      Image.fromarray(image).save(folder / "imgs" / n / f"sample_{k}.png")
      images.append(image)
      lines.append(LINE.format(n=n, k=k, label=k % 2))
    (folder / "metadata" / f"{n}.npy").write_text("".join(lines))
  return images


def test_archive_is_read_in_the_order_of_its_numbers(tmp_path):
  home = tmp_path / "pathfinder32" / "curv_contour_length_14"
  images = write_archive(home)
  task = TASKS["pathfinder32_archive"]
  for source in (home, home.parent):
    splits = {k: list(v) for k, v in task.splits(Options(source)).items()}
    assert [len(split) for split in splits.values()] == [16, 2, 2]
    rows = [row for split in splits.values() for row in split]
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
      np.testing.assert_array_equal(row.tokens[0], image.reshape(-1))
      assert row.label == i % 2


def test_the_known_empty_file_is_left_out(tmp_path, caplog):
  home = tmp_path / "pathfinder32" / "curv_baseline"
  write_archive(home, files=("0",), each=180)
  (home / "imgs" / "0" / "sample_172.png").write_bytes(b"")
  splits = TASKS["pathfinder32_archive"].splits(Options(home))
  with caplog.at_level(logging.WARNING):
    assert sum(len(list(split)) for split in splits.values()) == 179
  assert "sample_172.png is left out" in caplog.text


def cut_png(home):
  file = home / "imgs" / "0" / "sample_3.png"
  file.write_bytes(file.read_bytes()[:-200])


def no_png(home):
  (home / "imgs" / "0" / "sample_3.png").write_bytes(b"GIF89a nothing")


def empty_png(home):
  (home / "imgs" / "0" / "sample_3.png").write_bytes(b"")


def lost_png(home):
  (home / "imgs" / "0" / "sample_3.png").unlink()


def small_png(home):
  small = Image.fromarray(np.zeros((8, 8), np.uint8))
  small.save(home / "imgs" / "0" / "sample_3.png")


def coloured_png(home):
  image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
  image.save(home / "imgs" / "0" / "sample_3.png")


def change(line):
  def apply(home):
    file = home / "metadata" / "0.npy"
    lines = file.read_text().splitlines(keepends=True)
    lines[3] = line
    file.write_text("".join(lines))

  return apply


def cut_line(home):
  file = home / "metadata" / "0.npy"
  file.write_text(file.read_text()[:-4])


def real_npy(home):
  with open(home / "metadata" / "0.npy", "wb") as file:
    np.save(file, np.zeros(3))


def no_lines(home):
  (home / "metadata" / "0.npy").write_text("")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (cut_png, r"sample_3\.png is no whole PNG.*0\.npy, line 4"),
    (no_png, r"sample_3\.png is no whole PNG.*0\.npy, line 4"),
    (empty_png, r"sample_3\.png is an empty file.*0\.npy, line 4"),
    (lost_png, r"sample_3\.png is missing.*0\.npy, line 4"),
    (small_png, r"sample_3\.png has mode L and 8 x 8 .*0\.npy, line 4"),
    (coloured_png, r"sample_3\.png has mode RGB"),
    (change("imgs/0 sample_3.png 3 2\n"), r"0\.npy, line 4: label '2'; 0 or 1"),
    (change("imgs/0 sample_3.png 3\n"), r"0\.npy, line 4: 3 columns"),
    (change("../../.. x.png 3 1\n"), r"0\.npy, line 4: .* is outside of"),
    (cut_line, r"0\.npy, line 10: the line is cut off"),
    (real_npy, r"0\.npy is a NumPy array"),
    (no_lines, r"lists no image"),
  ],
)
def test_damage_is_named_and_nothing_is_left(tmp_path, damage, message):
  home = tmp_path / "pathfinder32" / "curv_contour_length_14"
  write_archive(home, files=("0",))
  damage(home)
  out = tmp_path / "out"
  with pytest.raises(ValueError, match=message):
    prepare_task(TASKS["pathfinder32_archive"], out, Options(home))
  assert not out.exists() or not list(out.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"metadata is missing.*pathfinder64"):
    prepare_task(TASKS["pathfinder64_archive"], tmp_path, Options(tmp_path / "x"))


def test_a_lost_file_is_not_the_known_empty_one(tmp_path):
  """Nor is one that is listed twice left alone."""
  home = tmp_path / "elsewhere" / "curv_baseline"
  write_archive(home, files=("0",), each=180)
  (home / "imgs" / "0" / "sample_172.png").unlink()
  splits = TASKS["pathfinder32_archive"].splits(Options(home))
  with pytest.raises(ValueError, match=r"sample_172\.png is missing"):
    [list(split) for split in splits.values()]
  (home / "imgs" / "0" / "sample_172.png").write_bytes(b"")
  splits = TASKS["pathfinder32_archive"].splits(Options(home))
  assert sum(len(list(split)) for split in splits.values()) == 179
  metadata = home / "metadata" / "0.npy"
  metadata.write_text(metadata.read_text() + metadata.read_text().split("\n")[0] + "\n")
  with pytest.raises(ValueError, match=r"line 181: .* was listed before"):
    TASKS["pathfinder32_archive"].splits(Options(home))
