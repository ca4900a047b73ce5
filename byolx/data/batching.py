"""Batches: from the numbers of records to arrays.

Worker processes are given the objects defined here. Each maps the number of a part of a batch to that
part, in any process and in any order; `sampler` says which records are in it.
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
from byolx.data.shared_memory import Borrower, Lender, Loan
from byolx.data.sources.base import Example, Source
from byolx.data.transforms import Array, Arrays, Random, Transform
from byolx.data.unreadable import Failure, TooManyFailuresError

Batch = dict[str, Any]

_REPLACEMENTS = 1000
"""After so many unreadable records in a row the source is given up."""

EVALUATION_SEED = 0
"""The seed of what a transform draws in evaluation: every evaluation of an image sees the same."""

_ALIGNMENT = 64
"""Bytes: every array of a block begins at a multiple."""


class Placed(NamedTuple):
  """Where the rows of one array lie inside a block of bytes."""

  name: str
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def of(self, block: UInt8[np.ndarray, "bytes"]) -> np.ndarray:
    """The array, a view of the block."""
    size = math.prod(self.shape) * self.dtype.itemsize
    return block[self.offset : self.offset + size].view(self.dtype).reshape(self.shape)


class Made(NamedTuple):
  """A part of a batch, and the unreadable records that came up while it was made.

  Attributes:
    placed: places of the large arrays inside the block.
    block: bytes of all large arrays, or the loan of the shared memory that holds them.
    rest: all other arrays by name.
    failures: unreadable records, in the order of rows.
  """

  placed: tuple[Placed, ...]
  block: UInt8[np.ndarray, "bytes"] | Loan
  rest: Batch
  failures: tuple[Failure, ...]


class Allocation:
  """The arrays of one part of a batch, to be filled row by row.

  Arrays with a shape of their own (images, masks, boxes) lie in one block of shared memory; scalars
  and the arrays inside a NamedTuple, such as a view's random numbers, go through a pipe.

  Args:
    arrays: shape and dtype of each array of one example, by name.
    rows: number of rows.
    lender: owner of the shared memory.
  """

  def __init__(self, arrays: Arrays, rows: int, lender: Lender):
    placed, end = [], 0
    for name, array in arrays.items():
      if isinstance(array, Array) and array.shape:
        dtype = np.dtype(array.dtype)
        placed.append(Placed(name, end, (rows, *array.shape), dtype))
        end += rows * math.prod(array.shape) * dtype.itemsize
        end += -end % _ALIGNMENT
    block, self._sent = lender.take(end)
    self._placed = tuple(placed)
    self._large = {place.name: place.of(block) for place in placed}
    self._rest = {
      name: _each(lambda x: np.empty((rows, *x.shape), x.dtype), array)
      for name, array in arrays.items()
      if name not in self._large
    }

  def row(self, row: int) -> Batch:
    """One row of every array, as views: what is written into them is in the batch."""
    rows = {name: array[row, ...] for name, array in self._large.items()}
    return rows | {name: _each(lambda x: x[row, ...], x) for name, x in self._rest.items()}

  def clear(self, row: int) -> None:
    """Fills one row with zeros."""
    for array in self.row(row).values():
      _each(lambda x: x.fill(0), array)

  def made(self, known: Batch, failures: tuple[Failure, ...]) -> Made:
    """The part, with the arrays of `known` as well."""
    return Made(self._placed, self._sent, known | self._rest, failures)


def _each(function: Callable[[Any], Any], array: Any) -> Any:
  """Applies a function to an array, or to each array of a NamedTuple."""
  if isinstance(array, tuple) and not isinstance(array, Array):
    return type(array)(*map(function, array))
  return function(array)


class Crew:
  """The threads of one process that fill the rows of a part side by side.

  Pickled without its threads, which start when they are first needed.
  """

  def __init__(self, threads: int):
    if threads < 1:
      raise ValueError(f"threads is {threads}; expected at least 1")
    self._threads = threads
    self._pool: ThreadPoolExecutor | None = None

  def __reduce__(self):
    return Crew, (self._threads,)

  def fill(self, rows: int, fill: Callable[[range], list[Failure]]) -> tuple[Failure, ...]:
    """Calls `fill` on ranges that cover all rows; returns the failures in the order of rows."""
    if self._threads == 1 or rows == 1:
      return tuple(fill(range(rows)))
    if self._pool is None:
      self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="byolx-input")
    # More ranges than threads: the one with the largest photographs should not be waited for.
    count = min(rows, 4 * self._threads)
    ranges = [range(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    return tuple(failure for failures in self._pool.map(fill, ranges) for failure in failures)

  def close(self) -> None:
    """Ends the threads."""
    if self._pool is not None:
      self._pool.shutdown()
      self._pool = None


class TrainPart:
  """Number of a part -> Made, for `loader.train_batches`."""

  def __init__(self, source: Source, transform: Transform, seed: int, rows: Rows, crew: Crew):
    self._source = source
    self._transform = transform
    self._arrays = transform.arrays
    self._seed = seed
    self._rows = rows
    self._crew = crew
    self._lender = Lender()

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count = len(places)
    label, index = np.empty(count, np.int32), np.empty(count, np.int32)
    allocation = Allocation(self._arrays, count, self._lender)

    def fill(rows: range) -> list[Failure]:
      stream, failures = Stream(self._seed), []
      for row in rows:
        epoch, place = divmod(places[row], self._rows.records)
        record = int(epoch_order(self._seed, epoch, self._rows.records)[place])
        example, index[row] = self._read(record, stream, failures)
        label[row] = example.label
        self._transform(example, Random(stream, record, epoch), allocation.row(row))
      return failures

    failures = self._crew.fill(count, fill)
    return allocation.made({"label": label, "index": index}, failures)

  def _read(self, record: int, stream: Stream, failures: list[Failure]) -> tuple[Example, int]:
    """The record, or a readable one in its place, which depends on seed and record only."""
    count = self._rows.records
    try:
      return self._source[record], record
    except DecodeError as error:
      failures.append(Failure(record, str(error)))
    # Stepping by a number without a common divisor visits every other record before the first
    # comes again.
    stride = int(stream.at(REPLACEMENT, record).integers(1, max(count, 2)))
    while math.gcd(stride, count) > 1:
      stride += 1
    for hop in range(1, min(count, _REPLACEMENTS)):
      other = (record + hop * stride) % count
      try:
        return self._source[other], other
      except DecodeError as error:
        failures.append(Failure(other, str(error)))
    raise TooManyFailuresError(
      f"{self._source.name}: {len(failures)} records in a row cannot be read, the first being"
      f" {failures[0].reason}; expected images"
    )


class EvaluationPart:
  """Number of a part -> Made, for `loader.evaluation_batches`."""

  def __init__(self, source: Source, transform: Transform, rows: Rows, crew: Crew):
    self._source = source
    self._transform = transform
    self._arrays = transform.arrays
    self._rows = rows
    self._crew = crew
    self._lender = Lender()

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count = len(places)
    label, index = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    mask = np.zeros(count, bool)
    allocation = Allocation(self._arrays, count, self._lender)

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

    failures = self._crew.fill(count, fill)
    return allocation.made({"label": label, "mask": mask, "index": index}, failures)


def join(parts: Sequence[Made], borrower: Borrower) -> tuple[Batch, tuple[Failure, ...]]:
  """One batch of its parts, in order, and the failures in them; a single part is not copied."""
  blocks = [borrower.open(part.block) for part in parts]
  batch = {}
  for places in zip(*(part.placed for part in parts), strict=True):
    arrays = [place.of(block) for place, block in zip(places, blocks, strict=True)]
    batch[places[0].name] = _concatenated(arrays)
  for key in parts[0].rest:
    batch[key] = _concatenated([part.rest[key] for part in parts])
  return batch, tuple(failure for part in parts for failure in part.failures)


def _concatenated(values: list[Any]) -> Any:
  if len(values) == 1:
    return values[0]
  if isinstance(values[0], tuple):
    return type(values[0])(*map(np.concatenate, zip(*values)))
  return np.concatenate(values)


def start_worker(*_) -> None:
  """Settles a worker process: it uses one core, and ends when its parent does."""
  end_with_parent()
  one_thread_per_image()
  threadpoolctl.threadpool_limits(1)


def one_thread_per_image() -> None:
  """OpenCV's own threads only get into the way of many small images."""
  cv2.setNumThreads(0)
