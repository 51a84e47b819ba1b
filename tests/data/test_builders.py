import logging
import os
import sys

import numpy as np
import pytest

from cached_tx.data import SPLITS, counts, documents, make_tokenizer, tokenize
from cached_tx.data.builders import mahoney, pg19

ARTICLES = [
  b" \n = Alpha = \n \n first <unk> words \n \n = = History = = \n \n more \n \n",
  b" = Beta = Gamma = \n \n 1 = 1 = 1 \n = not a title = \n \n x \n \n = nor this = \n",
]


def write_wikitext(folder):
  for short in ("train", "valid", "test"):
    text = b"".join(ARTICLES).replace(b"words", short.encode())
    (folder / f"wiki.{short}.tokens").write_bytes(text)


def write_pg19(folder, books=(3, 2, 2)):
  for split, count in zip(SPLITS, books, strict=True):
    (folder / split).mkdir()
    for i in range(count):
      (folder / split / f"{i}.txt").write_bytes(
        b"%s book %d\r\n\xff" % (split.encode(), i)
      )


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_one_file_is_cut_by_its_bytes(tmp_path, caplog, name):
  data = bytes(range(256)) * 4
  (tmp_path / name).write_bytes(data)
  with caplog.at_level(logging.WARNING):
    splits = [documents(name, split, str(tmp_path)) for split in SPLITS]
  assert [list(split) for split in splits] == [
    [data[:921]],
    [data[921:972]],
    [data[972:]],
  ]
  assert f"has 1024 bytes, the official {name} 100000000" in caplog.text
  by_file = documents(name, "test", str(tmp_path / name))
  assert (list(by_file), by_file.cache) == (list(splits[2]), splits[2].cache)


def test_official_size_with_another_checksum_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(mahoney, "OFFICIAL_BYTES", 1000)
  (tmp_path / "enwik8").write_bytes(bytes(1000))
  with pytest.raises(ValueError, match=r"md5 .* not a1fa5ffddb.*damaged"):
    documents("enwik8", "train", str(tmp_path))
  assert not list((tmp_path / ".cached_tx").iterdir())  # nothing half made is left


def test_file_too_small_for_three_splits(tmp_path):
  (tmp_path / "text8").write_bytes(b"abc")
  with pytest.raises(ValueError, match="3 bytes"):
    documents("text8", "train", str(tmp_path))


def test_wikitext103_documents_are_articles(tmp_path):
  write_wikitext(tmp_path)
  train = documents("wikitext103", "train", str(tmp_path))
  assert list(train) == [a.replace(b"words", b"train") for a in ARTICLES]
  valid = documents("wikitext103", "validation", str(tmp_path))
  assert b"".join(valid) == (tmp_path / "wiki.valid.tokens").read_bytes()


def test_wikitext103_words(tmp_path):
  write_wikitext(tmp_path)
  train = documents("wikitext103", "train", str(tmp_path))
  words = make_tokenizer("words", corpus=train)
  found = counts(train)
  text = b"".join(train)
  assert found.words == len(text.split()) + text.count(b"\n")
  assert found.rule == "whitespace-separated words, line ends"
  made = tokenize(train, words)
  assert len(made.flat) == found.words + len(train)
  assert words.decode(np.array(made.flat)) == text
  assert b"valid" not in words.words


def test_vocabulary_is_kept_and_not_that_of_another_split(tmp_path):
  write_wikitext(tmp_path)
  test = documents("wikitext103", "test", str(tmp_path))
  assert b"test" in make_tokenizer("words", corpus=test).words
  train = documents("wikitext103", "train", str(tmp_path))
  first = make_tokenizer("words", corpus=train)
  assert b"train" in first.words
  (train.cache / "wikitext103_train_words.txt").write_bytes(b"<eos>\n<unk>\n")
  assert make_tokenizer("words", corpus=train).vocab == 3


def test_pg19_documents_are_books(tmp_path):
  write_pg19(tmp_path)
  train = documents("pg19", "train", str(tmp_path))
  assert list(train) == [b"train book %d\r\n\xff" % i for i in range(3)]
  assert counts(train)[:3] == (3, 3 * 15, 3 * 4)


def test_pg19_words_are_the_published_ones_of_a_whole_split(tmp_path, monkeypatch):
  write_pg19(tmp_path)
  monkeypatch.setitem(pg19.BOOKS, "validation", 2)
  valid, test = (documents("pg19", s, str(tmp_path)) for s in ("validation", "test"))
  assert counts(valid).words == 3_007_061
  assert "published" in counts(valid).rule
  assert counts(test).words == 2 * 4


def test_order_holds_with_many_documents(tmp_path):
  write_pg19(tmp_path, books=(1200, 1, 1))
  names = sorted(os.listdir(tmp_path / "train"))
  want = [f"train book {name[:-4]}\r\n".encode() + b"\xff" for name in names]
  assert list(documents("pg19", "train", str(tmp_path))) == want


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("enwik8", ("enwik8.zip", "100,000,000 bytes", "a1fa5ffddb56f4953e226637dabbb36a")),
    ("text8", ("text8.zip", "100,000,000 bytes", "3bea1919949baf155f99411df5fada7e")),
    ("wikitext103", ("wiki.train.tokens", "wikitext-103-v1.zip", "1609.07843")),
    ("pg19", ("*.txt", "deepmind-gutenberg", "28,602")),
  ],
)
def test_missing_files_are_named(tmp_path, name, parts):
  with pytest.raises(FileNotFoundError) as error:
    documents(name, "train", str(tmp_path))
  for part in (str(tmp_path), "not downloaded", *parts):
    assert part in str(error.value)


def test_changed_files_are_prepared_anew(tmp_path):
  file = tmp_path / "text8"
  file.write_bytes(b"a" * 100)
  before = documents("text8", "test", str(tmp_path))
  stamp = os.stat(file).st_mtime_ns
  file.write_bytes(b"b" * 100)
  os.utime(file, ns=(stamp, stamp + 1_000_000_000))
  after = documents("text8", "test", str(tmp_path))
  assert (before[0], after[0]) == (b"aaaaa", b"bbbbb")


def test_prepared_once_in_a_cache_of_the_users_choice(tmp_path, monkeypatch):
  data, cache = tmp_path / "data", tmp_path / "cache"
  data.mkdir()
  (data / "enwik8").write_bytes(bytes(100))
  documents("enwik8", "train", str(data), cache=str(cache))
  assert os.listdir(data) == ["enwik8"]
  from cached_tx.data.builders.enwik8 import LocalEnwik8

  monkeypatch.setattr(LocalEnwik8, "download_and_prepare", None)  # not called again
  again = documents("enwik8", "test", str(data), cache=str(cache))
  assert list(again) == [bytes(5)]


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "enwik8").write_bytes(bytes(100))
  with pytest.raises(OSError, match="cannot write the prepared copy"):
    documents("enwik8", "train", str(tmp_path), cache=str(tmp_path / "enwik8" / "x"))


def test_tokens_are_written_once_and_mapped(tmp_path, monkeypatch):
  write_pg19(tmp_path)
  train = documents("pg19", "train", str(tmp_path))
  tokenizer = make_tokenizer("bytes")
  made = tokenize(train, tokenizer)
  in_memory = tokenize(list(train), tokenizer)
  assert isinstance(made.flat, np.memmap)
  assert made.flat.dtype == in_memory.flat.dtype
  np.testing.assert_array_equal(made.flat, in_memory.flat)
  np.testing.assert_array_equal(made.begins, in_memory.begins)
  monkeypatch.setattr(type(tokenizer), "encode", lambda *_: 1 / 0)  # not called again
  np.testing.assert_array_equal(tokenize(train, tokenizer).flat, made.flat)
  assert not list(train.cache.glob(".part-*"))


def test_tensorflow_is_never_imported(tmp_path):
  write_pg19(tmp_path)
  documents("pg19", "test", str(tmp_path))
  assert "tensorflow_datasets" in sys.modules
  assert "tensorflow" not in sys.modules
