"""The order of records and their random numbers: functions of (seed, step), over all hosts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byolx.data.sampler import ORDER, REPLACEMENT, VIEW, Rows, Stream, epoch_order

# Random numbers


def view_generator(seed, epoch, record, view):
  return Stream(seed).at(VIEW, record, epoch, view)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2**32 - 1, 3, 1_281_166, 1), (5, 999, 7, 0)])
def test_view_generator_is_numpys_philox(place):
  seed, epoch, record, view = place
  oracle = np.random.Philox(key=[seed, record], counter=[0, 0, epoch, view])
  generator = view_generator(*place)
  expected = np.random.Generator(oracle)
  for _ in range(3):
    assert generator.integers(7, dtype=np.uint32) == expected.integers(7, dtype=np.uint32)
    np.testing.assert_array_equal(generator.random(5), expected.random(5))


def test_streams_do_not_leak_into_each_other():
  def numbers(*place):
    return tuple(view_generator(*place).random(4))

  places = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1)))
  assert len({x for place in places for x in numbers(*place)}) == 4 * len(places)


def test_purposes_have_streams_of_their_own():
  stream = Stream(3)
  numbers = [stream.at(purpose, 5).random(4).tolist() for purpose in (VIEW, ORDER, REPLACEMENT)]
  assert len({x for some in numbers for x in some}) == 12


def test_a_moved_stream_forgets_where_it_was():
  """Also half a word that numpy keeps of the last 32-bit number, and the rest of a Philox block."""
  stream = Stream(1)
  stream.at(VIEW, 8).integers(5, size=3, dtype=np.uint32)
  moved = stream.at(VIEW, 9, epoch=2, view=1).integers(1 << 30, size=7, dtype=np.uint32)
  fresh = view_generator(1, 2, 9, 1).integers(1 << 30, size=7, dtype=np.uint32)
  np.testing.assert_array_equal(moved, fresh)


# The order of an epoch


def test_every_epoch_is_a_new_permutation():
  orders = [epoch_order(seed, epoch, 50) for seed in range(4) for epoch in range(4)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
  assert len({order.tobytes() for order in orders}) == 16


def test_orders_are_shuffled_over_the_whole_epoch():
  """Not in a window: where a record comes says nothing about where it lies."""
  order = epoch_order(0, 0, 100_000)
  assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.015  # 4.7 standard deviations
  assert np.abs(order - np.arange(100_000)).mean() == pytest.approx(100_000 / 3, rel=0.02)


def test_orders_are_shared_and_cannot_be_spoilt():
  with pytest.raises(ValueError, match="read-only"):
    epoch_order(0, 0, 10)[0] = 3


# The rows of a step


@st.composite
def layouts(draw):
  """(records, rows per host, hosts, parts per host): any, also where nothing divides."""
  local = draw(st.integers(1, 12))
  return draw(st.integers(1, 150)), local, draw(st.integers(1, 7)), draw(st.integers(1, local))


def places_of(rows: list[Rows], step: int) -> list[int]:
  """The places of a step, host by host and part by part."""
  return [
    place
    for host in rows
    for part in range(host.parts)
    for place in host.of(step * host.parts + part)
  ]


@given(layouts(), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_hosts_and_parts_cover_every_record_once_per_epoch(layout, seed, epochs):
  records, local, hosts, parts = layout
  rows = [Rows(records, local * hosts, host, hosts, parts) for host in range(hosts)]
  steps = -(-epochs * records // (local * hosts))
  stream = [place for step in range(steps) for place in places_of(rows, step)]
  assert stream == list(range(steps * local * hosts))
  for epoch in range(epochs):
    order = epoch_order(seed, epoch, records)
    seen = [order[place - epoch * records] for place in stream if place // records == epoch]
    assert sorted(seen) == list(range(records))


@given(layouts(), st.integers(0, 10**9))
def test_parts_are_even_and_belong_to_one_step(layout, step):
  records, local, hosts, parts = layout
  for host in range(hosts):
    rows = Rows(records, local * hosts, host, hosts, parts)
    sizes = [len(rows.of(step * parts + part)) for part in range(parts)]
    assert sum(sizes) == rows.local == local
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0
  assert rows.of(step * parts).start == step * local * hosts + (hosts - 1) * local


@given(layouts(), st.integers(0, 20))
def test_any_cut_is_the_same_stream(layout, step):
  records, local, hosts, parts = layout
  whole = Rows(records, local * hosts)
  cut = [Rows(records, local * hosts, host, hosts, parts) for host in range(hosts)]
  assert places_of(cut, step) == list(whole.of(step))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 0}, "batch_size is 0; expected a positive multiple of 2 hosts"),
    ({"batch_size": 7}, "batch_size is 7; expected a positive multiple of 2 hosts"),
    ({"host_index": 2}, "host_index is 2 of 2; expected 0 <= index < count"),
    ({"host_index": -1}, "host_index is -1 of 2; expected 0 <= index < count"),
    ({"host_index": 0, "host_count": 0}, "host_index is 0 of 0"),
  ],
)
def test_wrong_rows(change, message):
  with pytest.raises(ValueError, match=message):
    Rows(**{"records": 10, "batch_size": 8, "host_index": 0, "host_count": 2} | change)
