"""Image, Text and Retrieval from files in the originals' formats."""

import logging

import numpy as np
import pytest

from cached_tx.data.lra import TASKS, images, retrieval, text
from cached_tx.data.lra.base import Options
from cached_tx.data.lra.builder import prepare_task, read_examples
from cached_tx.data.sources.base import SPLITS


def rows(name, source, **options):
  made = TASKS[name].splits(Options(source, **options))
  return {split: list(made[split]) for split in SPLITS}


def refused(name, tmp_path, source, message, error=ValueError):
  """Preparing raises `error`, and leaves nothing behind."""
  out = tmp_path / "out"
  with pytest.raises(error, match=message):
    prepare_task(TASKS[name], out, Options(source))
  assert not out.exists() or not list(out.iterdir())


# ---- Image


def write_cifar(folder, each=4):
  """The six files; returns labels and colours (images, 3, 1024) of each."""
  folder.mkdir(parents=True)
  rng, made = np.random.default_rng(0), {}
  for name in images.TRAIN + images.TEST:
    labels = rng.integers(0, 10, (each, 1), np.uint8)
    colours = rng.integers(0, 256, (each, 3072), np.uint8)
    (folder / name).write_bytes(np.concatenate([labels, colours], axis=1).tobytes())
    made[name] = labels[:, 0], colours.reshape(each, 3, 1024)
  return made


def test_grey_is_what_tensorflow_says():
  ramp = np.arange(256, dtype=np.uint8)
  exact = [int(255.5 * 0.9999 * v / 255) for v in range(256)]  # 0.2989 + 0.587 + 0.114
  got = images.grey(ramp, ramp, ramp)
  np.testing.assert_array_equal(got, exact)
  assert got[255] == 255 and got[0] == 0
  rng = np.random.default_rng(0)
  r, g, b = rng.integers(0, 256, (3, 20000), np.uint8)
  y = (0.2989 * r + 0.587 * g + 0.114 * b) / 255 * 255.5
  sure = np.abs(y - np.round(y)) > 1e-3  # else float32 may decide otherwise
  np.testing.assert_array_equal(images.grey(r, g, b)[sure], np.floor(y)[sure])
  assert sure.mean() > 0.99


def test_image_records(tmp_path):
  home = tmp_path / "cifar-10-batches-bin"
  made = write_cifar(home)
  for source in (home, tmp_path):
    splits = rows("image", source)
    assert [len(splits[split]) for split in SPLITS] == [18, 2, 4]
  train = splits["train"] + splits["validation"]
  labels = np.concatenate([made[name][0] for name in images.TRAIN])
  colours = np.concatenate([made[name][1] for name in images.TRAIN])
  assert [row.label for row in train] == labels.tolist()
  for row, (r, g, b) in zip(train, colours, strict=True):
    np.testing.assert_array_equal(row.tokens[0], images.grey(r, g, b))
  assert [row.label for row in splits["test"]] == made["test_batch.bin"][0].tolist()


def test_image_is_prepared(tmp_path):
  write_cifar(tmp_path / "data", each=10)
  about = prepare_task(TASKS["image"], tmp_path / "out", Options(tmp_path / "data"))
  assert [about[split]["examples"] for split in SPLITS] == [45, 5, 10]
  want = rows("image", tmp_path / "data")["validation"]
  got = read_examples(TASKS["image"], "validation", tmp_path / "out")
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a.tokens[0], b.tokens[0])
    assert a.label == b.label


def test_damaged_images(tmp_path):
  home = tmp_path / "data"
  write_cifar(home)
  whole = (home / "data_batch_3.bin").read_bytes()
  (home / "data_batch_3.bin").write_bytes(whole[:-1])
  refused(
    "image", tmp_path, home, r"data_batch_3\.bin has 12291 bytes.*record 3 is cut"
  )
  (home / "data_batch_3.bin").write_bytes(b"")
  refused("image", tmp_path, home, r"data_batch_3\.bin has 0 bytes")
  wrong = bytearray(whole)
  wrong[images.RECORD] = 10
  (home / "data_batch_3.bin").write_bytes(wrong)
  refused("image", tmp_path, home, r"data_batch_3\.bin, record 1: label 10; 0 to 9")
  (home / "test_batch.bin").unlink()
  missing = r"test_batch\.bin is missing.*cifar-10-binary"
  refused("image", tmp_path, home, missing, FileNotFoundError)


# ---- Text


def write_imdb(folder, each=60):
  for part in ("train", "test"):
    for name, rating in (("pos", 8), ("neg", 3)):
      (folder / part / name).mkdir(parents=True)
      for i in range(each):
        review = f"{part} {name} {i} é <br />".encode() + bytes([255, 0])
        (folder / part / name / f"{i}_{rating}.txt").write_bytes(review)


def read(row):
  return bytes((row.tokens[0] - 1).astype(np.uint8))


def test_text_bytes_and_splits(tmp_path, caplog):
  write_imdb(tmp_path / "aclImdb")
  with caplog.at_level(logging.WARNING):
    splits = rows("text", tmp_path / "aclImdb")
  assert "has 120 reviews, the official set 25000" in caplog.text
  found = {split: {read(row): row.label for row in splits[split]} for split in SPLITS}
  assert len(found["test"]) == 120
  assert len(found["train"]) + len(found["validation"]) == 120
  assert not set(found["train"]) & set(found["validation"])
  assert 4 <= len(found["validation"]) <= 24
  whole = found["train"] | found["validation"]
  assert whole["train pos 7 é <br />".encode() + bytes([255, 0])] == 1
  assert whole["train neg 59 é <br />".encode() + bytes([255, 0])] == 0
  assert all(review.startswith(b"test") for review in found["test"])
  row = splits["train"][0].tokens[0]
  assert row.dtype == np.uint16 and row.min() == 1 and row.max() == 256


def test_validation_of_text_is_carved_by_seed_and_name(tmp_path):
  write_imdb(tmp_path / "aclImdb")
  names = lambda **o: [read(r) for r in rows("text", tmp_path, **o)["validation"]]
  assert names() == names(seed=0) != names(seed=1)
  many = [f"train/{c}/{i}_8.txt" for c in ("pos", "neg") for i in range(12500)]
  assert sum(text.carved(text.Review(name, 1, ""), 0) for name in many) == 2495


def test_reviews_of_a_film_are_in_one_split(tmp_path, caplog):
  """Five reviews each; a film has good and bad ones."""
  write_imdb(tmp_path)
  film = lambda i: f"http://films/{i // 5}/usercomments"
  for part in ("train", "test"):
    for name in ("pos", "neg"):
      lines = "".join(film(i) + "\n" for i in range(60))
      (tmp_path / part / f"urls_{name}.txt").write_text(lines)
  with caplog.at_level(logging.WARNING):
    splits = rows("text", tmp_path)
  assert "of one film" not in caplog.text
  seen = {
    split: {film(int(read(row).split()[2])) for row in splits[split]}
    for split in ("train", "validation")
  }
  assert seen["validation"] and not seen["train"] & seen["validation"]
  (tmp_path / "train" / "urls_pos.txt").write_text(film(0))
  refused("text", tmp_path, tmp_path, r"urls_pos\.txt has 1 lines, no ")
  (tmp_path / "train" / "urls_pos.txt").unlink()
  with caplog.at_level(logging.WARNING):
    rows("text", tmp_path)
  assert "reviews of one film may be in train" in caplog.text


def test_official_validation_is_the_test_set(tmp_path):
  write_imdb(tmp_path, each=3)
  splits = rows("text_official", tmp_path)
  assert [read(row) for row in splits["validation"]] == [
    read(row) for row in splits["test"]
  ]
  assert len(splits["train"]) == 6
  assert "as published" in TASKS["text_official"].source


def test_damaged_reviews(tmp_path):
  home = tmp_path / "aclImdb"
  write_imdb(home)
  odd = home / "train" / "pos" / "7_8.txt"
  odd.write_bytes(b"")
  refused("text", tmp_path, home, r"train/pos/7_8\.txt is empty")
  odd.rename(home / "train" / "pos" / "7_2.txt")
  refused("text", tmp_path, home, r"pos/7_2\.txt: a rating of 2 of 10 is not pos")
  (home / "train" / "pos" / "7_2.txt").rename(home / "train" / "pos" / "x.txt")
  refused("text", tmp_path, home, r"pos/x\.txt is no review")
  (home / "train" / "pos" / "x.txt").rename(odd)
  odd.write_bytes(b"whole again")
  (home / "test" / "neg").rename(home / "test" / "bad")
  missing = r"test/neg is missing.*aclImdb_v1"
  refused("text", tmp_path, home, missing, FileNotFoundError)


# ---- Retrieval

PAIRS = [b"1.0\tP1\tP2\tsome text\tanother", b"0.0\tP3\tP4\t\xff\x00 x\ty\x01"]


def write_pairs(folder, lines=PAIRS, end=b"\n"):
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("train", "eval", "test"):
    (folder / f"new_aan_pairs.{name}.tsv").write_bytes(b"\n".join(lines) + end)


def test_pairs(tmp_path):
  long = b"0.0\ta\tb\t" + b"x" * 10_001 + b"\tz"
  write_pairs(tmp_path, [*PAIRS, long])
  splits = rows("retrieval", tmp_path)
  one, two, three = splits["validation"]
  assert [row.label for row in (one, two, three)] == [1, 0, 0]
  as_bytes = lambda row: [bytes((ids - 1).astype(np.uint8)) for ids in row.tokens]
  assert as_bytes(one) == [b"some text", b"another"]
  assert as_bytes(two) == [b"\xff\x00 x", b"y\x01"]
  assert [len(ids) for ids in three.tokens] == [10_000, 1]


def test_pairs_are_prepared(tmp_path):
  write_pairs(tmp_path / "data")
  task = TASKS["retrieval"]
  prepare_task(task, tmp_path / "out", Options(tmp_path / "data"))
  got = read_examples(task, "test", tmp_path / "out")[1]
  want = rows("retrieval", tmp_path / "data")["test"][1]
  for a, b in zip(got.tokens, want.tokens, strict=True):
    np.testing.assert_array_equal(a, b)


def test_examples_of_two_splits_and_other_sizes_are_warned_of(tmp_path, caplog):
  write_pairs(tmp_path / "data")
  with caplog.at_level(logging.WARNING):
    about = prepare_task(
      TASKS["retrieval"], tmp_path / "out", Options(tmp_path / "data")
    )
  assert [about[split]["repeated"] for split in SPLITS] == [0, 2, 2]
  assert "retrieval test: 2 of its 2 examples are in an earlier split" in caplog.text
  assert "retrieval train has 2 examples, the official set 147086" in caplog.text


def test_a_seed_that_draws_nothing_is_refused(tmp_path):
  write_pairs(tmp_path / "data")
  with pytest.raises(ValueError, match="retrieval has nothing that a seed draws"):
    prepare_task(TASKS["retrieval"], tmp_path, Options(tmp_path / "data", seed=1))


def test_a_folder_of_something_else_is_named(tmp_path):
  """Folders of the archive have names of tasks."""
  write_pairs(tmp_path / "retrieval")
  with pytest.raises(ValueError, match="was not made by cached-tx lra prepare"):
    prepare_task(TASKS["retrieval"], tmp_path, Options(tmp_path / "retrieval"))
  assert len(list((tmp_path / "retrieval").iterdir())) == 3


@pytest.mark.parametrize(
  ("lines", "end", "message"),
  [
    ([PAIRS[0], b"1.0\tP1\tP2\tsome te"], b"\n", r"train\.tsv, line 2: 4 columns"),
    ([PAIRS[0], PAIRS[1] + b"\tmore"], b"\n", r"train\.tsv, line 2: 6 columns"),
    (PAIRS, b"", r"train\.tsv, line 2: the line is cut off"),
    ([PAIRS[0], b"2.0\ta\tb\tc\td"], b"\n", r"line 2: label b'2.0'; 0.0 or 1.0"),
    ([PAIRS[0], b"0.0\ta\tb\t\td"], b"\n", r"line 2: text 1 is empty"),
    ([PAIRS[0], b"", PAIRS[1]], b"\n", r"line 2: 1 columns"),
    ([b"0.0\ta\tb\tc\t" + b"d" * (1 << 24)], b"\n", r"line 1: more than 16777216"),
    ([], b"", r"train\.tsv is empty"),
  ],
)
def test_damaged_pairs(tmp_path, lines, end, message):
  write_pairs(tmp_path / "data", lines, end)
  refused("retrieval", tmp_path, tmp_path / "data", message)


def test_the_last_pair_of_all_needs_no_line_end(tmp_path, monkeypatch):
  """Where there are as many as were published, nothing was cut off."""
  write_pairs(tmp_path, PAIRS, b"")
  monkeypatch.setattr(retrieval, "_PAIRS", dict.fromkeys(SPLITS, len(PAIRS)))
  assert len(rows("retrieval", tmp_path)["train"]) == len(PAIRS)


def test_missing_pairs(tmp_path):
  write_pairs(tmp_path / "data")
  (tmp_path / "data" / "new_aan_pairs.eval.tsv").unlink()
  missing = r"eval\.tsv is missing.*tsv_data"
  refused("retrieval", tmp_path, tmp_path / "data", missing, FileNotFoundError)
  assert retrieval.LONGEST == 10_000
