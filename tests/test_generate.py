"""Generation: equal to the full forward pass, repeatable, streaming, of flat memory."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cached_tx import generate as module
from cached_tx.data import make_tokenizer
from cached_tx.generate import decoded, generate, write
from cached_tx.layers import is_stream
from cached_tx.load import Loaded
from cached_tx.train.metrics import CompileCounter
from tests.kinds import EACH, V, parallel, toy

BOS = V - 1
LENGTH = 12  # a whole number of segments


def full_greedy(own, prompt, length):
  """Greedy tokens by a whole forward pass for each of them."""
  tokens = np.zeros((1, LENGTH), np.int32)  # what comes later cannot matter
  tokens[0, : len(prompt)] = prompt
  for at in range(len(prompt), len(prompt) + length):
    logits, _, _ = parallel(own, tokens, tokens == BOS)
    tokens[0, at] = np.argmax(logits[0, at - 1, :BOS])  # BOS, the last, is no text
  return tokens[0, len(prompt) : len(prompt) + length].tolist()


@EACH
def test_greedy_equals_the_full_forward_pass(kind):
  own = toy(kind)
  prompt = [BOS, 3, 1, 4, 1, 5]  # one whole segment and two tokens more
  options = {"bos": BOS, "length": 6, "temperature": 0}
  got = list(generate(own.model, own.params, prompt, **options))
  assert got == full_greedy(own, prompt, 6)


def sample(prompt=(BOS, 1, 2), *, kind="xl", **options):
  own = toy(kind)
  options = {"bos": BOS, "length": 20, **options}
  return list(generate(own.model, own.params, prompt, **options))


def test_samples_depend_on_the_seed_alone(monkeypatch):
  want = sample(seed=1)
  assert sample(seed=1) == want
  assert sample(seed=2) != want
  assert sample(seed=1, length=7) == want[:7]
  assert sample(seed=1, length=0) == []
  monkeypatch.setattr(module, "CHUNK", 3)
  assert sample(seed=1) == want


def test_rows_are_drawn_apart_and_do_not_depend_on_their_number():
  rows = np.stack(sample(seed=1, batch=2))
  assert rows.shape == (20, 2) and rows.dtype == np.int32
  assert rows[:, 0].tolist() == sample(seed=1)
  assert rows[:, 1].tolist() != rows[:, 0].tolist()
  prompts = [[BOS, 1, 2], [BOS, 3, 3]]
  assert sample(prompts, temperature=0, batch=2)[0].shape == (2,)


def test_numbers_change_without_compiling_and_nothing_compiles_while_running():
  sample([BOS, *range(9)], top_k=3)  # whole segments, and tokens one by one
  with CompileCounter() as compiled:
    sample(top_k=4, temperature=0.3, seed=5, length=70)
    sample([BOS, *range(9)], top_p=0.9)
    sample([BOS, *range(8)], top_k=1)
  assert not {"_chunk", "_read"} & set(compiled.counts), compiled.counts


def test_cuts_leave_the_likeliest_tokens():
  greedy = sample(temperature=0)
  assert sample(top_k=1) == greedy
  assert sample(top_p=1e-6) == greedy
  logits = jnp.log(jnp.array([[0.1, 0.5, 0.25, 0.15]]))

  def seen(k, p, temperature=1.0):
    numbers = module._Sampling(*map(jnp.asarray, (float(temperature), k, float(p), 0)))
    draw = jax.vmap(lambda n: module._sample(logits, n, numbers, False, True))
    return np.bincount(np.ravel(draw(jnp.arange(2000))), minlength=4) / 2000

  np.testing.assert_allclose(seen(0, 1), [0.1, 0.5, 0.25, 0.15], rtol=0, atol=0.04)
  np.testing.assert_allclose(seen(2, 1), [0, 2 / 3, 1 / 3, 0], rtol=0, atol=0.04)
  assert (seen(0, 0.74) > 0).tolist() == [False, True, True, False]
  assert (seen(0, 0.76) > 0).tolist() == [False, True, True, True]
  assert seen(0, 1, temperature=0.1)[1] > 0.98


def test_bos_is_never_sampled():
  assert BOS not in sample(seed=3, temperature=1e3, length=200)


def test_the_coldest_temperature_is_greedy():
  assert sample(temperature=1e-40) == sample(temperature=0)
  assert len(sample(temperature=2 * module.COLDEST)) == 20


def test_memory_is_flat_and_tokens_come_before_the_end():
  own = toy("compressive-conv")
  ids = generate(own.model, own.params, [BOS], bos=BOS)  # without end
  list(itertools.islice(ids, 3 * module.CHUNK))
  before = sum(a.nbytes for a in jax.live_arrays())
  list(itertools.islice(ids, 30 * module.CHUNK))
  assert sum(a.nbytes for a in jax.live_arrays()) == before


def test_a_state_goes_on_and_stays_valid():
  own = toy("xl")
  whole = sample([BOS, 1, 2, 3, 4, 5], temperature=0)
  tokens = np.array([[BOS, 1, 2, 3]], np.int32)
  _, state, _ = parallel(own, tokens, tokens == BOS)
  assert not is_stream(state)
  for _ in range(2):  # the first run donates nothing of ours
    assert sample([4, 5], temperature=0, state=state) == whole
  stream = own.model.open_stream(state, 1)
  assert sample([4, 5], temperature=0, state=stream) == whole


@pytest.mark.parametrize("kind", ["xl", "favor"])
def test_a_text_goes_on_from_where_it_stood(kind):
  own, prompt = toy(kind), [BOS, 3, 1, 4, 1, 5, 2]
  want = sample(prompt, kind=kind, seed=4, length=21)
  for cut in (0, 1, 16, 20):
    first = generate(own.model, own.params, prompt, bos=BOS, length=cut, seed=4)
    assert first.reached is None
    got = list(first)
    assert first.reached.drawn == cut
    assert first.reached.last.tolist() == [*prompt, *got][-1:]
    for _ in range(2):  # it stays valid
      more = sample([], kind=kind, seed=4, length=21 - cut, after=first.reached)
      assert got + more == want


def test_a_question_after_a_text_that_was_read_once():
  own, prompt = toy("compressive-conv"), [BOS, 3, 1, 4, 1, 5]
  text = generate(own.model, own.params, prompt, bos=BOS, length=0)
  assert list(text) == []
  for question in ([2, 7], [1, 8, 2, 8]):
    options = {"temperature": 0, "length": 6, "kind": "compressive-conv"}
    want = sample(prompt + question, **options)
    assert sample(question, after=text.reached, **options) == want


def test_rows_go_on_as_well():
  prompts, options = [[BOS, 1, 2], [BOS, 3, 3]], {"batch": 2, "bos": BOS, "seed": 2}
  own = toy("xl")
  want = np.stack(sample(prompts, batch=2, seed=2, length=7))
  first = generate(own.model, own.params, prompts, length=3, **options)
  got = [*first]
  assert first.reached.last.tolist() == want[2].tolist()
  options |= {"after": first.reached, "length": 4}
  got += generate(own.model, own.params, [], **options)
  np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match="batch is 1, but after has 2 rows"):
    generate(own.model, own.params, [], **(options | {"batch": 1}))
  with pytest.raises(ValueError, match="state and after cannot both be given"):
    generate(own.model, own.params, [], state=first.reached.state, **options)


@pytest.mark.parametrize(
  "options,named",
  [
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"seed": 2**31}, "seed is 2147483648"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 0}, "top_p is 0"),
    ({"length": -1}, "length is -1"),
    ({"batch": 0}, "batch is 0"),
    ({"prompt": []}, "begin a document with BOS"),
    ({"prompt": [[1], [2]]}, "shape"),
    ({"prompt": [V]}, f"0 to {V - 1}"),
  ],
)
def test_what_cannot_be_is_refused_at_once(options, named):
  own = toy("xl")
  prompt = options.pop("prompt", [BOS])
  with pytest.raises(ValueError, match=named):
    generate(own.model, own.params, prompt, **{"bos": BOS, "length": 1, **options})


class Pieces:
  """A tokenizer whose text depends on neighbours: spaces stand between words only."""

  name = identity = "pieces"
  bos, vocab = 3, 4
  words = (b"a", b"bc", "é".encode())

  def encode(self, text):
    return np.array([self.words.index(word) for word in text.split()], np.int32)

  def decode(self, ids):
    return b" ".join(self.words[i] for i in ids if i != self.bos)


def test_text_of_a_tokenizer_that_looks_at_neighbours():
  rng = np.random.default_rng(0)
  ids = rng.integers(4, size=50).tolist()
  want = Pieces().decode(ids)
  assert b"".join(decoded(Pieces(), ids)) == want
  later = b"".join(decoded(Pieces(), ids[20:], ids[:20]))
  assert Pieces().decode(ids[:20]) + later == want


class Halves(Pieces):
  """Two pieces make one character."""

  words = tuple(bytes([byte]) for byte in "é".encode())

  def decode(self, ids):
    text = b"".join(self.words[i] for i in ids if i != self.bos)
    return text.decode(errors="replace").encode()


def test_an_incomplete_character_at_the_end_is_written():
  assert list(decoded(Halves(), [0, 1])) == ["é".encode(), b""]
  assert b"".join(decoded(Halves(), [0, 1, 0])) == "é\ufffd".encode()


class Out(io.BytesIO):
  flushes = 0

  def flush(self):
    self.flushes += 1


def test_write_passes_bytes_on_as_they_come(monkeypatch):
  def fake(*_, length, **__):
    yield from [*"é".encode(), 65][:length]

  monkeypatch.setattr(module, "generate", fake)
  own = Loaded(toy("xl").model, {}, None, make_tokenizer("bytes"), ConfigDict(), 0)
  out = Out()
  assert write(own, b"", out, tokens=9) == 3
  assert out.getvalue() == "éA".encode() and out.flushes == 3
  out = Out()
  assert write(own, b"", out, tokens=1) == 1
  assert out.getvalue() == "é".encode()[:1]
