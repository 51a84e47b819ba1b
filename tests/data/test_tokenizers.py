import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached_tx.data import TOKENIZERS, documents, make_tokenizer
from cached_tx.data.tokenizers import Words

TEXT = b" \n = A Title = \n \n the the <unk> cat \n the end \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A SentencePiece model without normalisation and with byte fallback."""
  import sentencepiece

  folder = tmp_path_factory.mktemp("model")
  corpus = folder / "corpus.txt"
  corpus.write_bytes(documents("web_en", "test")[1][:20_000])
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(folder / "own_bos"),
    vocab_size=600,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    minloglevel=2,
  )
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(folder / "no_bos"),
    vocab_size=300,
    bos_id=-1,
    minloglevel=2,
  )
  return folder


@given(st.binary())
def test_bytes_round_trip(text):
  tokenizer = make_tokenizer("bytes")
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(np.array([256, *ids, 256])) == text
  assert (ids < tokenizer.bos).all()


def test_bytes_ids():
  tokenizer = make_tokenizer("bytes")
  assert (tokenizer.name, tokenizer.vocab, tokenizer.bos) == ("bytes", 257, 256)
  assert tokenizer.encode(b"\x00A\xff").tolist() == [0, 65, 255]


def test_words_are_ordered_by_frequency_then_bytes():
  words = Words.from_corpus([b"the end", TEXT])
  # <eos> 5, the 4, = 2 and end 2 (met before =), then the words that are there once
  assert words.words == [
    *(b"<eos>", b"the", b"=", b"end"),
    *(b"<unk>", b"A", b"Title", b"cat"),
  ]
  assert (words.vocab, words.bos) == (9, 8)


def test_words_round_trip_in_the_form_of_wikitext():
  words = Words.from_corpus([TEXT])
  assert words.decode(words.encode(TEXT)) == TEXT
  assert words.decode(np.array([words.bos])) == b""


def test_unknown_word_and_unfinished_line():
  words = Words.from_corpus([b"a b\n"])
  ids = words.encode(b"a zebra\nb")
  assert [words.words[i] for i in ids] == [b"a", b"<unk>", b"<eos>", b"b"]


def test_words_from_a_file(tmp_path):
  words = Words.from_corpus([TEXT])
  words.save(tmp_path / "v.txt")
  again = make_tokenizer("words", str(tmp_path / "v.txt"))
  assert (again.words, again.identity) == (words.words, words.identity)
  (tmp_path / "bad.txt").write_bytes(b"a\nb\n")
  with pytest.raises(ValueError, match="<eos>"):
    make_tokenizer("words", str(tmp_path / "bad.txt"))


def test_sentencepiece_own_bos(model):
  tokenizer = make_tokenizer("sentencepiece", str(model / "own_bos.model"))
  assert (tokenizer.vocab, tokenizer.bos) == (600, 1)
  text = "In the beginning God,  said é\n <s> “Let”".encode()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.bos not in ids
  assert len(ids) < len(text)
  assert tokenizer.decode(np.array([tokenizer.bos, *ids])) == text


def test_sentencepiece_extra_bos(model):
  tokenizer = make_tokenizer("sentencepiece", str(model / "no_bos.model"))
  assert (tokenizer.vocab, tokenizer.bos) == (301, 300)
  ids = tokenizer.encode(b"the LORD said")
  assert tokenizer.decode(np.array([300, *ids])) == b"the LORD said"
  own = make_tokenizer("sentencepiece", str(model / "own_bos.model"))
  assert own.identity != tokenizer.identity


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (("chars",), ValueError, "'chars' is unknown: bytes, sentencepiece, words"),
    (("bytes", "x"), ValueError, "takes none"),
    (("words",), ValueError, r"needs data\.vocab"),
    (("words", "/nowhere"), FileNotFoundError, "nowhere"),
    (("sentencepiece",), ValueError, "needs its model file"),
    (("sentencepiece", "/nowhere"), FileNotFoundError, r"data\.vocab='/nowhere'"),
  ],
)
def test_wrong_arguments(arguments, error, message):
  with pytest.raises(error, match=message):
    make_tokenizer(*arguments)


def test_table():
  assert list(TOKENIZERS) == ["bytes", "sentencepiece", "words"]
