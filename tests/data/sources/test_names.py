"""Names: what goes in comes out, and little is pickled."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byolx.data.sources.names import Names, Numbered, Picked

TEXTS = st.lists(st.text(), max_size=30)
FILE_NAMES = st.lists(st.binary(max_size=20), max_size=30)


@given(TEXTS)
def test_names_are_a_sequence_of_strings(texts):
  texts = [text.encode("utf-8", "replace").decode() for text in texts]
  names = Names.of(texts)
  assert len(names) == len(texts)
  assert list(names) == texts
  assert [names[i] for i in range(-len(texts), len(texts))] == texts * 2
  assert list(names[1::2]) == texts[1::2]
  assert list(names[::-1]) == texts[::-1]
  copy = pickle.loads(pickle.dumps(names))
  assert list(copy) == texts
  for index in (len(texts), -len(texts) - 1):
    with pytest.raises(IndexError):
      names[index]


@given(FILE_NAMES)
def test_file_names_may_be_any_bytes(raw):
  texts = [name.decode("utf-8", "surrogateescape") for name in raw]
  assert list(Names.of(texts)) == texts
  assert Names.of(texts).buffer == b"".join(raw)


@given(st.lists(TEXTS, max_size=5))
def test_joined(parts):
  parts = [[text.encode("utf-8", "replace").decode() for text in part] for part in parts]
  expected = [text for part in parts for text in part]
  assert list(Names.joined([Names.of(part) for part in parts])) == expected


@given(st.data())
def test_take_and_picked(data):
  texts = [f"été/{i}" * (i % 3) for i in range(data.draw(st.integers(1, 40)))]
  indices = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1))), np.int64)
  expected = [texts[i] for i in indices]
  assert list(Names.of(texts).take(indices)) == expected
  picked = Picked(texts, indices)
  assert len(picked) == len(expected)
  assert list(picked) == expected
  with pytest.raises(IndexError):
    picked[len(expected)]


def test_numbered():
  names = Numbered("digits", 3)
  assert list(names) == ["digits/0", "digits/1", "digits/2"]
  assert names[-1] == "digits/2"
  assert "digits/1" in names
  with pytest.raises(IndexError):
    names[3]


def test_names_cost_their_letters_and_eight_bytes():
  texts = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20_000)]
  letters = sum(map(len, texts))
  assert len(pickle.dumps(Names.of(texts))) < letters + 8 * len(texts) + 1000


def test_names_print_a_few():
  assert repr(Names.of("abcde")) == "Names(5: a, b, c, ...)"
  assert repr(Names.of("a")) == "Names(1: a)"
  assert repr(Names.of([])) == "Names(0: )"
