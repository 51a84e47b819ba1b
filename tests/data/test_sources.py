import lzma
import re
from importlib import resources

import pytest

from cached_tx.data import SOURCES, SPLITS, counts, documents
from cached_tx.data.sources.splits import byte_ranges, hashed_split

WEB_BYTES = 4_905_739


def every(name, path=""):
  """The documents of all splits, in order."""
  return [list(documents(name, split, path)) for split in SPLITS]


def test_web_documents_are_the_bytes_of_the_file():
  packed = resources.files("cached_tx.data") / "text" / "web_en.txt.xz"
  text = lzma.decompress(packed.read_bytes())
  splits = every("web_en")
  assert len(text) == WEB_BYTES
  assert b"".join(b"".join(split) for split in splits) == text


def test_web_documents_are_books():
  splits = every("web_en")
  assert [len(split) for split in splits] == [58, 6, 18]  # 80 books, 2 of them cut
  inside = [book for split in splits for book in split[1:]]
  titles = [book.split(b"\n", 1)[0] for book in inside]
  assert len(set(titles)) == 79
  for title in (b"Psalms 1", b"Esther (Greek) 1", b"Song of Solomon 1", b"Jude 1"):
    assert title in titles
  for book in inside:  # one book and no other: one first chapter
    assert len(re.findall(rb"(?m)^\n[^\n]+ 1\n\n", b"\n" + book)) == 1


def test_web_cuts_are_the_first_line_starts_after_the_rule():
  sizes = [sum(map(len, split)) for split in every("web_en")]
  text = b"".join(b"".join(split) for split in every("web_en"))
  for cut, percent in ((sizes[0], 90), (sizes[0] + sizes[1], 95)):
    exact = WEB_BYTES * percent // 100
    assert exact <= cut
    assert text[cut - 1 : cut] == b"\n"
    assert b"\n" not in text[exact - 1 : cut - 1]


def test_python_stdlib_is_split_by_file():
  train, validation, test = every("python_stdlib")
  assert len(train) > 10 * len(validation) > 0
  assert len(test) > 0
  assert 5e6 < sum(map(len, train)) < 50e6
  assert documents("python_stdlib", "train")[0] == train[0]


def test_hashed_split_is_fixed():
  names = [f"folder/file_{i}.txt" for i in range(2_000)]
  found = [hashed_split(name) for name in names]
  assert found[:30].count("train") == 29
  assert [i for i in range(60) if found[i] == "validation"] == [18, 38, 52, 55]
  assert [found.count(split) for split in SPLITS] == [1790, 103, 107]


def test_byte_ranges_give_the_standard_split_of_enwik8():
  assert byte_ranges(100_000_000) == {
    "train": (0, 90_000_000),
    "validation": (90_000_000, 95_000_000),
    "test": (95_000_000, 100_000_000),
  }


def test_text_file_is_cut_at_lines(tmp_path):
  file = tmp_path / "book.txt"
  file.write_bytes(b"".join(b"line %d\n" % i for i in range(300)) + b"no newline")
  splits = every("text", str(file))
  assert [len(split) for split in splits] == [1, 1, 1]
  assert b"".join(b"".join(split) for split in splits) == file.read_bytes()
  for split in splits[1:]:
    assert split[0].startswith(b"line ")
  assert 0.90 <= len(splits[0][0]) / file.stat().st_size < 0.91


def test_cut_at_a_line_start_stays(tmp_path):
  file = tmp_path / "a"
  file.write_bytes(b"123456789\n" * 100)
  assert [len(split[0]) for split in every("text", str(file))] == [900, 50, 50]


def test_text_folder_of_few_files_is_cut_by_bytes(tmp_path):
  (tmp_path / "b").mkdir()
  for name, size in (("b/2", 40), ("a", 30), ("c", 30), ("b/empty", 0)):
    (tmp_path / name).write_bytes(b"x\n" * size)
  (tmp_path / ".hidden").write_bytes(b"no")
  splits = every("text", str(tmp_path))
  assert [[len(part) for part in split] for split in splits] == [
    [60, 80, 40],
    [10],
    [10],
  ]


def test_text_folder_of_many_files_is_split_by_name(tmp_path):
  for i in range(200):
    (tmp_path / f"{i:03d}").write_bytes(b"%03d" % i)
  splits = every("text", str(tmp_path))
  for name, split in zip(SPLITS, splits, strict=True):
    assert split
    assert split == sorted(split)
    assert {hashed_split(part.decode()) for part in split} == {name}
  assert sum(map(len, splits)) == 200


def test_text_folder_with_splits_of_its_own(tmp_path):
  for split in SPLITS:
    (tmp_path / split / "deep").mkdir(parents=True)
    (tmp_path / split / "deep" / "x").write_bytes(split.encode())
  assert every("text", str(tmp_path)) == [[split.encode()] for split in SPLITS]


def test_text_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"data\.path=.*nowhere"):
    documents("text", "train", str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="no bytes for the train split"):
    documents("text", "train", str(tmp_path))


def test_file_that_shrinks_is_noticed(tmp_path):
  file = tmp_path / "a"
  file.write_bytes(b"x\n" * 100)
  split = documents("text", "train", str(file))
  file.write_bytes(b"x\n")
  with pytest.raises(ValueError, match="became shorter"):
    _ = split[0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("books", "train"), r"data\.name='books' is unknown: one of web_en"),
    (("web_en", "valid"), "split='valid' is unknown: one of train, validation"),
    (("web_en", "train", "/x"), "takes no path"),
    (("enwik8", "train"), r"needs data\.path"),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    documents(*arguments)


def test_table_names_loaders():
  assert set(SOURCES) >= {"web_en", "python_stdlib", "text", "enwik8", "text8"}


def test_documents_are_a_sequence():
  test = documents("web_en", "test")
  assert test[-1] == test[len(test) - 1]
  assert test[1:3] == [test[1], test[2]]
  with pytest.raises(IndexError):
    _ = test[len(test)]


def test_counts(tmp_path):
  (tmp_path / "a").write_bytes(b"one two\nthree \xc3\xa9\n" * 100)
  found = counts(documents("text", "train", str(tmp_path / "a")))
  assert found[:3] == (1, 1530, 360)
  assert found.rule == "whitespace-separated words"
