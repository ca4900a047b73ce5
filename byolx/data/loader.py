"""Batches, made ahead of time in threads or worker processes.

Everything about a batch is a function of (source, transform, seed, step): `sampler` says which records
are in it and gives their random numbers, the transform turns an example into arrays, `batching` puts
them together. So neither the number of hosts, workers, threads or devices nor a restart changes what
is trained on, and any view can be drawn again.

grain runs the work: part of a batch -> arrays is a `grain.MapDataset`. Its elements are parts of
batches rather than records because its bookkeeping per element costs as much as a view of a small
image. Worker processes write large arrays into shared memory, see `shared_memory`.

Files that cannot be read do not stop a run, see `unreadable`.
"""

import itertools
import math
import sys
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from grain.experimental import (
  DatasetOptions,
  ThreadPrefetchIterDataset,
  WithOptionsIterDataset,
)
from jaxtyping import Int32, UInt8

from byolx.core.machine import usable_cores
from byolx.data.batching import (
  Batch,
  Crew,
  EvaluationPart,
  Made,
  TrainPart,
  join,
  one_thread_per_image,
  start_worker,
)
from byolx.data.sampler import Rows
from byolx.data.shared_memory import Borrower
from byolx.data.sources.base import Source
from byolx.data.transforms import Transform
from byolx.data.unreadable import FailureLog

_SHARED_BYTES = 2**16
"""Smaller arrays come from workers through a pipe: each array in shared memory is a file."""

PART_ROWS = 128
"""Worker processes make larger batches in parts of about so many rows: their memory stays small."""


def train_batches(
  source: Source,
  transform: Transform,
  batch_size: int,
  seed: int,
  *,
  start_step: int = 0,
  workers: int = 0,
  threads: int = 1,
  host_index: int = 0,
  host_count: int = 1,
  max_failed_share: float = 0.01,
  named: set[str] | None = None,
  prefetch: int = 2,
) -> "Batches":
  """Endless training batches.

  Args:
    source: the examples.
    transform: function from an example to the rows of a batch.
    batch_size: rows of the global batch; every host yields `batch_size / host_count` of them.
    seed: seed of the order of records and of all random numbers, 0 to 2**32 - 1.
    start_step: number of the first batch, from 0: the step of a restored state.
    workers: processes that make batches; 0 makes them in this process, -1 is one per core.
    threads: threads that make a batch side by side, in this process or in each worker. Decoding and
      resizing release the interpreter; the code between them does not.
    host_index, host_count: number of this host, and of hosts; each has one block of the global batch.
    max_failed_share: share of unreadable records above which the run stops, see `unreadable`.
    named: unreadable records that were logged before, see `FailureLog`.
    prefetch: batches made ahead of time; 0 makes each when it is asked for, in the caller.

  Returns:
    An iterator of dicts; call its `close()`, or use it in a with statement:
      the arrays of the transform, with a leading axis b.
      label: int32 [b], -1 if unlabelled.
      index: int32 [b], number of the record whose pixels these are.

  Raises:
    ValueError: a setting is outside its range; later, from the iterator, too many unreadable files.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1")
  if start_step < 0:
    raise ValueError(f"start_step is {start_step}; expected at least 0")
  workers, crew = _workers(workers), Crew(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  make = TrainPart(source, transform, seed, rows, crew)
  parts = grain.MapDataset.range(start_step * rows.parts, sys.maxsize).map(make)
  consequence = "another one takes its place"
  failures = FailureLog(source.name, len(source), max_failed_share, consequence, named)
  return Batches(parts, rows.parts, failures, crew, workers, prefetch)


def evaluation_batches(
  source: Source,
  transform: Transform,
  batch_size: int,
  *,
  workers: int = 0,
  threads: int = 1,
  host_index: int = 0,
  host_count: int = 1,
  max_failed_share: float = 0.01,
  named: set[str] | None = None,
  prefetch: int = 2,
) -> "Batches":
  """Batches of every record once, in order.

  The last batch is padded to `batch_size`. Padding and unreadable files are rows whose `mask` is
  False; all their arrays are 0, label and index -1.

  Args:
    source: the examples.
    transform: function from an example to the rows of a batch.
    batch_size: rows of the global batch.
    workers, threads, host_index, host_count, max_failed_share, named, prefetch: see `train_batches`.

  Returns:
    An iterator of dicts: the arrays of the transform, label int32 [b], mask bool [b], index int32 [b].
    It closes itself at the end.

  Raises:
    ValueError: see `train_batches`.
  """
  workers, crew = _workers(workers), Crew(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  make = EvaluationPart(source, transform, rows, crew)
  # Without an end, as a worker that comes to its end takes with it the memory that it lends.
  parts = grain.MapDataset.range(sys.maxsize).map(make)
  failures = FailureLog(source.name, len(source), max_failed_share, "it is left out", named)
  count = math.ceil(len(source) / batch_size)
  return Batches(parts, rows.parts, failures, crew, workers, prefetch, count)


def evaluation_images(
  source: Source, transform: Transform, *, workers: int = 0
) -> tuple[UInt8[np.ndarray, "n size size 3"], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
  """Array `image`, label and index of all readable records, in order, for sources that fit into memory.

  Raises:
    ValueError: see `train_batches`; or no record can be read.
  """
  batch_size = max(1, min(len(source), 256))
  with evaluation_batches(source, transform, batch_size, workers=workers) as batches:
    parts = [
      tuple(batch[key][batch["mask"]] for key in ("image", "label", "index")) for batch in batches
    ]
  images, labels, indices = (np.concatenate(part) for part in zip(*parts))
  if not len(images):
    raise ValueError(f"{source.name}: no record can be read; expected images")
  return images, labels, indices


def _workers(count: int) -> int:
  if count < -1:
    raise ValueError(f"workers is {count}; expected at least 0, or -1 for one per core")
  return usable_cores() if count == -1 else count


def _rows(source: Source, batch_size: int, host_index: int, host_count: int, workers: int) -> Rows:
  if not len(source):
    raise ValueError(f"{source.name} is empty; expected at least one record")
  rows = Rows(len(source), batch_size, host_index, host_count)
  parts = math.ceil(rows.local / PART_ROWS) if workers else 1
  return Rows(len(source), batch_size, host_index, host_count, parts)


class Batches(Iterator[Batch]):
  """Iterator over batches that are made ahead of time; close it when done, or use `with`.

  Args:
    made: numbers of parts -> Made, from the first part of a batch on, without an end.
    parts: of a batch.
    failures: what to do about unreadable records.
    crew: the threads that `made` uses in this process.
    workers, prefetch: as for `train_batches`.
    count: of batches; None for no end.
  """

  def __init__(
    self,
    made: grain.MapDataset[Made],
    parts: int,
    failures: FailureLog,
    crew: Crew,
    workers: int,
    prefetch: int,
    count: int | None = None,
  ):
    if prefetch < 0:
      raise ValueError(f"prefetch is {prefetch}; expected at least 0")
    one_thread_per_image()
    # No threads of grain's inside: the thread, the crew or the workers below are the only ones.
    dataset = made.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain hands its flags on to the workers
      ahead = max(1, math.ceil(prefetch * parts / workers))
      options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
      dataset = WithOptionsIterDataset(dataset, DatasetOptions(min_shm_size=_SHARED_BYTES))
      dataset = dataset.mp_prefetch(options, worker_init_fn=start_worker)
    else:
      dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    self._parts = parts
    self._steps = itertools.count() if count is None else iter(range(count))
    self._borrower = Borrower()
    self._running = [crew, iter(dataset)]  # empty once closed; closed from the last to the first
    self._failures = failures
    self._finalizer = weakref.finalize(self, _close_all, self._running)

  def __next__(self) -> Batch:
    """The next batch. An error that was raised in making it is raised here, and closes."""
    if not self._running:
      raise StopIteration
    try:
      next(self._steps)
      parts = list(itertools.islice(self._running[-1], self._parts))
      batch, failures = join(parts, self._borrower)
      self._failures.add(batch["index"], failures)
    except BaseException:
      self.close()
      raise
    return batch

  def close(self) -> None:
    """Stops the threads or the workers and waits for their end. May be called again."""
    self._finalizer()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _close_all(running: list[Crew | grain.DatasetIterator]) -> None:
  while running:
    running.pop().close()
