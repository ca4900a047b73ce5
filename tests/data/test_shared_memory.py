"""Shared memory: filled again only after the last array on it is gone, across processes too."""

import gc
import multiprocessing
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byolx.core import sharding
from byolx.data import shared_memory
from byolx.data.shared_memory import BufferHandle, BufferReader, Buffers

SHAPE = (2, 8, 16, 16, 3)


def fill(buffers, reader, value, shape=SHAPE):
  """The reader's array on a piece that the buffers filled with `value`, and the handle."""
  array, sent = buffers.take(*shape)
  array[:] = value
  return reader.open(sent), sent


@pytest.fixture
def pair():
  return Buffers(), BufferReader()


def pieces_of(buffers):
  return len(buffers._pieces)


# One process


def test_what_is_written_is_read_in_place(pair):
  buffers, reader = pair
  array, sent = buffers.take(*SHAPE)
  pixels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
  array[:] = pixels
  assert isinstance(sent, BufferHandle)
  assert len(pickle.dumps(sent)) < 200  # not the pixels
  read = reader.open(sent)
  np.testing.assert_array_equal(read, pixels)
  assert read.dtype == np.uint8
  array[0, 0, 0, 0, 0] ^= 255
  assert read[0, 0, 0, 0, 0] == array[0, 0, 0, 0, 0]


def test_pieces_are_used_again_once_nobody_holds_them(pair):
  buffers, reader = pair
  handles = set()
  for value in range(20):
    read, sent = fill(buffers, reader, value)
    assert (read == value).all()
    handles.add(sent)
    del read
  assert len(handles) == pieces_of(buffers) == 1


HOLDERS = {
  "view": lambda a: a[1],
  "view of views": lambda a: a[1:].reshape(-1)[3:].view(np.int8)[::2],
  "transposed": lambda a: a.transpose(4, 0, 1, 2, 3).swapaxes(0, 1),
  "in containers": lambda a: {"batches": [(a[0], 1)]},
  "iterator": iter,
  "memoryview": lambda a: memoryview(a[0]),
  "split": lambda a: np.split(a, 2)[1],
  "frombuffer": lambda a: np.frombuffer(a, np.uint16),
}


def bytes_of(held):
  """What a holder sees, as bytes."""
  if isinstance(held, dict):
    held = held["batches"][0][0]
  if type(held).__name__ == "iterator":
    return None
  return np.asarray(held).tobytes()


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whoever_holds_a_part_keeps_all_of_it(pair, hold):
  buffers, reader = pair
  read, first = fill(buffers, reader, 7)
  held = hold(read)
  before = bytes_of(held)
  del read
  others = [fill(buffers, reader, value)[1] for value in (1, 2, 3)]
  assert first not in others
  assert bytes_of(held) == before
  del held
  gc.collect()
  assert first in [fill(buffers, reader, 4)[1] for _ in range(2)]


def test_arrays_kept_in_a_list_never_change(pair):
  buffers, reader = pair
  kept = [fill(buffers, reader, value)[0] for value in range(12)]
  assert pieces_of(buffers) == 12
  for value, array in enumerate(kept):
    assert (array == value).all()


PUTS = {
  "device_put": jax.device_put,
  "asarray": jnp.asarray,
  "one device of several": lambda a: jax.device_put(a, jax.devices()[-1]),
  "spread over a mesh": lambda a: sharding.put_batch({"x": a}, sharding.make_mesh(4))["x"],
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_jax_arrays_hold_the_memory_that_they_alias(pair, put):
  """On CPU jax may use numpy's memory as it is."""
  buffers, reader = pair
  kept = []
  for value in range(6):
    read, _ = fill(buffers, reader, value, (4, 32, 32, 3))
    kept.append(put(read))
    del read
  for value, array in enumerate(kept):
    np.testing.assert_array_equal(array, np.full((4, 32, 32, 3), value))
  del kept, array
  gc.collect()
  count = pieces_of(buffers)
  fill(buffers, reader, 1, (4, 32, 32, 3))
  assert pieces_of(buffers) == count <= 7


def test_results_still_to_be_computed_hold_what_they_read(pair):
  buffers, reader = pair

  @jax.jit
  def slow(x):
    y = jnp.full((300, 300), x.astype(jnp.float32).mean())
    return jax.lax.fori_loop(0, 20, lambda _, y: y @ y / 300 / y.max(), y), x.astype(int).sum()

  shape = (4, 32, 32, 3)
  results = [slow(jnp.asarray(fill(buffers, reader, v, shape)[0]))[1] for v in range(1, 9)]
  assert [int(result) for result in results] == [v * 4 * 32 * 32 * 3 for v in range(1, 9)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5000)), min_size=1, max_size=60))
def test_held_arrays_never_change_and_pieces_never_pile_up(moves):
  """Each move gives back what was held in one of six slots and puts a new array there."""
  buffers, reader, slots, largest = Buffers(), BufferReader(), {}, 0
  for value, (slot, size) in enumerate(moves):
    slots.pop(slot, None)
    slots[slot] = (value % 256, fill(buffers, reader, value % 256, (size,))[0])
    largest = max(largest, len(slots))
    for expected, array in slots.values():
      assert (array == expected).all()
    del array
  if len({size for _, size in moves}) == 1:
    assert pieces_of(buffers) <= largest


def test_buffers_close_their_files():
  buffers, reader = Buffers(), BufferReader()
  filled = [fill(buffers, reader, value) for value in range(3)]
  files = [f"/proc/self/fd/{sent.fd}" for _, sent in filled]
  assert all("byolx-batch" in os.readlink(file) for file in files)
  del buffers
  gc.collect()
  assert not any(os.path.exists(file) for file in files)
  for value, (read, _) in enumerate(filled):
    assert (read == value).all()


# Pickling, and other processes


def test_buffers_are_pickled_without_their_memory(pair):
  buffers, reader = pair
  held = fill(buffers, reader, 1)
  copy = pickle.loads(pickle.dumps(buffers))
  assert pieces_of(copy) == 0
  other = fill(copy, reader, 2)
  assert (held[0] == 1).all()
  assert (other[0] == 2).all()


def _fill_in_worker(buffers, pipe):
  """Answers every number with a handle that is filled with it, until None comes."""
  while (value := pipe.recv()) is not None:
    array, sent = buffers.take(*SHAPE)
    array[:] = value
    pipe.send(sent)


@pytest.fixture
def worker():
  """A spawned process that fills buffers: ask(value) -> BufferHandle; and the process."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=_fill_in_worker, args=(Buffers(), theirs), daemon=True)
  process.start()

  def ask(value):
    ours.send(value)
    assert ours.poll(60)
    return ours.recv()

  yield ask, process
  if process.is_alive():
    ours.send(None)
    process.join(60)
  assert process.exitcode is not None


def test_memory_of_a_spawned_process(worker):
  (ask, process), reader = worker, BufferReader()
  handles = []
  for value in range(10):  # released at once: one piece
    handles.append(ask(value))
    assert (reader.open(handles[-1]) == value).all()
  assert len(set(handles)) == 1
  assert handles[0].pid == process.pid != os.getpid()
  kept = [reader.open(ask(value))[0, value % 8] for value in range(10)]
  for value, array in enumerate(kept):
    assert (array == value).all()
  del kept[3:], array
  gc.collect()
  seen = {ask(99) for _ in range(9)}  # not opened: they stay in use
  assert len(seen) == 9
  for value, array in enumerate(kept):
    assert (array == value).all()
  process.kill()
  process.join(60)
  for value, array in enumerate(kept):  # memory lives as long as its last mapping
    assert (array == value).all()
  with pytest.raises(OSError, match="proc"):
    BufferReader().open(handles[0])


def test_fresh_arrays_without_shared_memory(monkeypatch):
  monkeypatch.setattr(shared_memory, "POSSIBLE", False)
  buffers, reader = Buffers(), BufferReader()
  arrays = []
  for value in range(4):
    array, sent = buffers.take(3, 5)
    assert array is sent
    array[:] = value
    arrays.append(reader.open(sent))
  for value, array in enumerate(arrays):
    assert array.shape == (3, 5)
    assert (array == value).all()
  assert pieces_of(buffers) == 0
