"""Loads batches in parts: reads the records of a part and fills the arrays of its rows.

A part is a range of consecutive rows of a batch. Each host loads its rows of a batch in one or more
parts. `TrainPart` and `EvaluationPart` load the part with a given number. They are pickled into worker
processes. They may be called in any process and in any order, because `sampler` computes the records
(examples) of a part from its number alone.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import threadpoolctl
from jaxtyping import UInt8

from byolx.core.machine import end_with_parent
from byolx.data.decode import DecodeError
from byolx.data.sampler import REPLACEMENT, Rows, Stream, epoch_order
from byolx.data.shared_memory import BufferHandle, BufferReader, Buffers
from byolx.data.sources.base import Example, Source
from byolx.data.transforms import Array, Arrays, Random, Transform
from byolx.data.unreadable import Failure, TooManyFailuresError

Batch = dict[str, Any]

_REPLACEMENTS = 1000
"""Largest number of records tried for one row of a batch; if none can be read, an error is raised."""

EVALUATION_SEED = 0
"""Seed of the random numbers that a transform gets in evaluation; it is the same in all runs."""

_ALIGNMENT = 64
"""Alignment in bytes of the arrays that share one block of memory."""


class Slot(NamedTuple):
  """Position, shape and dtype of one array in a block of bytes that holds several arrays.

  Attributes:
    name: name of the array in the batch.
    offset: first byte of the array in the block.
    shape: shape of the array, rows first.
    dtype: numpy type of the values.
  """

  name: str
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def of(self, block: UInt8[np.ndarray, "bytes"]) -> np.ndarray:
    """Returns the array as a numpy view of `block`, without a copy."""
    size = math.prod(self.shape) * self.dtype.itemsize
    return block[self.offset : self.offset + size].view(self.dtype).reshape(self.shape)


class LoadedPart(NamedTuple):
  """A part of a batch (some of its rows), and the records (examples) that could not be read for it.

  Attributes:
    slots: positions in `block` of the large arrays, such as images.
    block: bytes of all large arrays, or the handle of the shared memory that holds these bytes.
    small: all other arrays, such as labels, by name.
    failures: unreadable records, in the order of the rows.
  """

  slots: tuple[Slot, ...]
  block: UInt8[np.ndarray, "bytes"] | BufferHandle
  small: Batch
  failures: tuple[Failure, ...]


class Allocation:
  """Allocates the arrays of one part of a batch, which are then filled row by row.

  Images and other arrays with several values per row are together in one block of shared memory. Arrays
  with one number per row are ordinary arrays, and so are those of a NamedTuple, such as a view's random
  numbers.

  Args:
    arrays: shape and dtype of each array for one example, by name.
    rows: number of rows of the part.
    buffers: shared memory of this process.
  """

  def __init__(self, arrays: Arrays, rows: int, buffers: Buffers):
    slots, end = [], 0
    for name, array in arrays.items():
      if isinstance(array, Array) and array.shape:
        dtype = np.dtype(array.dtype)
        slots.append(Slot(name, end, (rows, *array.shape), dtype))
        end += rows * math.prod(array.shape) * dtype.itemsize
        end += -end % _ALIGNMENT
    block, self._sent = buffers.take(end)
    self._slots = tuple(slots)
    self._large = {slot.name: slot.of(block) for slot in slots}
    self._small = {
      name: _each(lambda x: np.empty((rows, *x.shape), x.dtype), array)
      for name, array in arrays.items()
      if name not in self._large
    }
    # `row` runs once per image, so arrays and tuples of arrays are told apart here.
    tuples = {name: x for name, x in self._small.items() if isinstance(x, tuple)}
    self._tuples = [(name, type(x), tuple(x)) for name, x in tuples.items()]
    every = self._large | self._small
    self._arrays = [(name, x) for name, x in every.items() if name not in tuples]

  def row(self, row: int) -> Batch:
    """Returns row `row` of each array by name, as numpy views to be filled."""
    rows = {name: array[row, ...] for name, array in self._arrays}
    for name, kind, arrays in self._tuples:
      rows[name] = kind(*[array[row, ...] for array in arrays])
    return rows

  def clear(self, row: int) -> None:
    """Fills row `row` of all arrays with zeros."""
    for array in self.row(row).values():
      _each(lambda x: x.fill(0), array)

  def finish(self, others: Batch, failures: tuple[Failure, ...]) -> LoadedPart:
    """Returns the filled part, with the arrays `others` and the unreadable records `failures` added."""
    return LoadedPart(self._slots, self._sent, others | self._small, failures)


def _each(function: Callable[[Any], Any], array: Any) -> Any:
  """Applies `function` to an array, or to each array of a NamedTuple, and returns the result."""
  if isinstance(array, tuple) and not isinstance(array, Array):
    return type(array)(*map(function, array))
  return function(array)


class ThreadPool:
  """Threads of one process that fill the rows of a part of a batch in parallel.

  The threads start on first use. They are not pickled: a copy in another process starts its own.

  Args:
    threads: number of threads, at least 1.

  Raises:
    ValueError: `threads` is less than 1.
  """

  def __init__(self, threads: int):
    if threads < 1:
      raise ValueError(f"threads is {threads}; expected at least 1")
    self._threads = threads
    self._executor: ThreadPoolExecutor | None = None

  def __reduce__(self):
    return ThreadPool, (self._threads,)

  def fill(self, rows: int, fill: Callable[[range], list[Failure]]) -> tuple[Failure, ...]:
    """Fills all rows of a part: divides them into ranges, and calls `fill` for these in parallel.

    Args:
      rows: number of rows of the part.
      fill: function that fills a range of rows and returns the unreadable records it met.

    Returns:
      The unreadable records, in the order of the rows.
    """
    if self._threads == 1 or rows == 1:
      return tuple(fill(range(rows)))
    if self._executor is None:
      self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="byolx-input")
    # More ranges than threads, so that threads stay busy if some photographs are larger than others.
    count = min(rows, 4 * self._threads)
    ranges = [range(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    return tuple(failure for failures in self._executor.map(fill, ranges) for failure in failures)

  def close(self) -> None:
    """Ends the threads; a later call of `fill` starts new ones."""
    if self._executor is not None:
      self._executor.shutdown()
      self._executor = None


class TrainPart:
  """Callable that loads one part of a training batch: some of its rows.

  It is called with the number of the part, counted over all batches.

  Args:
    source: training examples.
    transform: function that fills one row of the arrays from an example.
    seed: seed of the order of records and of all random numbers.
    rows: division of the records into batches and parts.
    pool: threads that fill the rows.
  """

  def __init__(self, source: Source, transform: Transform, seed: int, rows: Rows, pool: ThreadPool):
    self._source = source
    self._transform = transform
    self._arrays = transform.arrays
    self._seed = seed
    self._rows = rows
    self._pool = pool
    self._buffers = Buffers()

  def __call__(self, number: int) -> LoadedPart:
    places = self._rows.of(number)
    count = len(places)
    label, index = np.empty(count, np.int32), np.empty(count, np.int32)
    allocation = Allocation(self._arrays, count, self._buffers)

    def fill(rows: range) -> list[Failure]:
      stream, failures = Stream(self._seed), []
      for row in rows:
        epoch, place = divmod(places[row], self._rows.records)
        record = int(epoch_order(self._seed, epoch, self._rows.records)[place])
        example, index[row] = self._read(record, stream, failures)
        label[row] = example.label
        self._transform(example, Random(stream, record, epoch), allocation.row(row))
      return failures

    failures = self._pool.fill(count, fill)
    return allocation.finish({"label": label, "index": index}, failures)

  def _read(self, record: int, stream: Stream, failures: list[Failure]) -> tuple[Example, int]:
    """Reads a record (an example). If it is unreadable, reads others until one is readable.

    The order in which other records are tried depends on the seed and on `record` only.

    Args:
      record: index of the record in the source.
      stream: random generator with the run's seed.
      failures: list to which the unreadable records are appended.

    Returns:
      The example, and the index of the record that was read.

    Raises:
      TooManyFailuresError: too many records were tried, and none can be read.
    """
    count = self._rows.records
    try:
      return self._source[record], record
    except DecodeError as error:
      failures.append(Failure(record, str(error)))
    # A stride coprime to the number of records visits all other records before it repeats one.
    stride = int(stream.at(REPLACEMENT, record).integers(1, max(count, 2)))
    while math.gcd(stride, count) > 1:
      stride += 1
    for attempt in range(1, min(count, _REPLACEMENTS)):
      other = (record + attempt * stride) % count
      try:
        return self._source[other], other
      except DecodeError as error:
        failures.append(Failure(other, str(error)))
    raise TooManyFailuresError(
      f"{self._source.name}: {len(failures)} records in a row cannot be read, the first being"
      f" {failures[0].reason}; expected images"
    )


class EvaluationPart:
  """Callable that loads one part of an evaluation batch: some of its rows.

  It is called with the number of the part, counted over all batches.

  Args:
    source: examples.
    transform: function that fills one row of the arrays from an example.
    rows: division of the records into batches and parts.
    pool: threads that fill the rows.
  """

  def __init__(self, source: Source, transform: Transform, rows: Rows, pool: ThreadPool):
    self._source = source
    self._transform = transform
    self._arrays = transform.arrays
    self._rows = rows
    self._pool = pool
    self._buffers = Buffers()

  def __call__(self, number: int) -> LoadedPart:
    places = self._rows.of(number)
    count = len(places)
    label, index = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    mask = np.zeros(count, bool)
    allocation = Allocation(self._arrays, count, self._buffers)

    def fill(rows: range) -> list[Failure]:
      stream, failures = Stream(EVALUATION_SEED), []
      for row in rows:
        record = places[row]
        if record >= self._rows.records:
          allocation.clear(row)
          continue
        try:
          example = self._source[record]
        except DecodeError as error:
          failures.append(Failure(record, str(error)))
          allocation.clear(row)
          continue
        self._transform(example, Random(stream, record, 0), allocation.row(row))
        label[row], index[row], mask[row] = example.label, record, True
      return failures

    failures = self._pool.fill(count, fill)
    return allocation.finish({"label": label, "mask": mask, "index": index}, failures)


def join(parts: Sequence[LoadedPart], reader: BufferReader) -> tuple[Batch, tuple[Failure, ...]]:
  """Joins the parts of one batch; a single part is not copied.

  Args:
    parts: all parts of the batch, in the order of its rows.
    reader: reader of the shared memory of worker processes.

  Returns:
    The arrays of the batch by name, and the unreadable records of all parts.

  Raises:
    OSError: a worker process has ended, so its memory cannot be opened.
  """
  blocks = [reader.open(part.block) for part in parts]
  batch = {}
  for slots in zip(*(part.slots for part in parts), strict=True):
    arrays = [slot.of(block) for slot, block in zip(slots, blocks, strict=True)]
    batch[slots[0].name] = _concatenated(arrays)
  for key in parts[0].small:
    batch[key] = _concatenated([part.small[key] for part in parts])
  return batch, tuple(failure for part in parts for failure in part.failures)


def _concatenated(values: list[Any]) -> Any:
  if len(values) == 1:
    return values[0]
  if isinstance(values[0], tuple):
    return type(values[0])(*map(np.concatenate, zip(*values)))
  return np.concatenate(values)


def start_worker(*_) -> None:
  """Sets up a worker process: OpenCV and BLAS use one thread, and the process ends with its parent."""
  end_with_parent()
  one_thread_per_image()
  threadpoolctl.threadpool_limits(1)


def one_thread_per_image() -> None:
  """Turns off OpenCV's own threads in this process, since images are already loaded in parallel."""
  cv2.setNumThreads(0)
