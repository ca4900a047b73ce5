"""Checks of fields say what they take."""

import math

from hypothesis import given
from hypothesis import strategies as st

from byolx.core.fields import above, at_least, between, each, interval, one_of, whole

numbers = st.floats(allow_nan=True, allow_infinity=True)
finite = st.floats(-1e9, 1e9)


@given(numbers, finite)
def test_at_least_and_above(x, minimum):
  assert (at_least(minimum)(x) is None) == (math.isfinite(x) and x >= minimum)
  assert (above(minimum)(x) is None) == (math.isfinite(x) and x > minimum)


@given(numbers, finite, finite)
def test_between(x, one, other):
  low, high = sorted((one, other))
  assert (between(low, high)(x) is None) == (low <= x <= high)
  assert between(low, high)(math.nan) is not None


@given(st.lists(numbers, max_size=3))
def test_interval(pair):
  fits = len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1
  assert (interval(0, 1)(tuple(pair)) is None) == fits


@given(st.lists(st.integers(-2, 5), max_size=4), st.one_of(st.none(), st.integers(0, 4)))
def test_each(values, length):
  fits = all(value >= 1 for value in values) and length in (None, len(values))
  assert (each(whole(1), length)(tuple(values)) is None) == fits


def test_whole_numbers_only():
  assert whole(1)(2) is None
  assert whole(1)(2.0) == "a whole number of at least 1"


def test_what_was_expected_is_said():
  assert at_least(2)(1) == "a finite number of at least 2"
  assert above(0)(-1.0) == "a finite number above 0"
  assert between(0, 0.5)(1) == "a number from 0 to 0.5"
  assert one_of("a", "b")("c") == "one of a, b"
  assert interval(0, 1)((1, 0)) == "two numbers in order, from 0 to 1"
  assert each(above(0), 3)((1, 2)) == "3 values"
  assert each(above(0), 3)((1, 2, -3)) == "each a finite number above 0"
