"""Loads batches of training or evaluation data in advance, by threads or worker processes.

A batch depends only on the source, the transform, the seed and the step. `sampler` computes the records
(examples) of the batch and their random numbers. The transform turns each example into arrays, and
`batching` collects the arrays. So batches do not depend on restarts, or on the number of hosts, workers,
threads or devices. Every view (augmented image) can be reproduced.

The library grain schedules the work. Its overhead per element is as large as the cost of a view of a
small image. So an element is not a single record. It is a whole batch or, with worker processes, a large
part of a batch. Worker processes write large arrays into shared memory (`shared_memory`).

A few unreadable files do not stop a run: they are replaced or left out (`unreadable`).
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
  EvaluationPart,
  LoadedPart,
  ThreadPool,
  TrainPart,
  join,
  one_thread_per_image,
  start_worker,
)
from byolx.data.sampler import Rows
from byolx.data.shared_memory import BufferReader
from byolx.data.sources.base import Source
from byolx.data.transforms import Transform
from byolx.data.unreadable import FailureLog

_SHARED_BYTES = 2**16
"""Size in bytes from which grain sends an array through its own shared memory, one file per array."""

PART_ROWS = 128
"""Largest number of rows that a worker process loads at a time, to limit the memory it needs."""


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
  """Returns an endless iterator over training batches, which are loaded in advance.

  Args:
    source: training examples.
    transform: function that fills one row of a batch from an example.
    batch_size: rows of the global batch; each host loads `batch_size / host_count` of them.
    seed: seed of the order of records and of all random numbers, 0 to 2**32 - 1.
    start_step: number of the first batch, from 0; after a restart, the step of the restored state.
    workers: number of worker processes; 0 to load in this process, -1 for one per core.
    threads: number of threads that fill a batch in parallel, in this process or in each worker.
      Decoding and resizing release Python's global lock; other code does not.
    host_index: index of this host, 0 to host_count - 1.
    host_count: number of hosts; each loads one block of rows of the global batch.
    max_failed_share: largest share of unreadable records, 0 to 1; up to ten are accepted in any case,
      unless the share is 0.
    named: error messages of unreadable records that were logged before. They are not logged again. New
      messages are added.
    prefetch: number of batches loaded in advance. With 0, each batch is loaded in the call of `next`;
      but a worker process always loads at least one part of a batch in advance.

  Returns:
    Iterator of dicts, to be closed by `close()` or used in a with statement. Each dict has the arrays of
    the transform and two more, all with b = batch_size / host_count rows:
      label: int32 [b], -1 if unlabelled.
      index: int32 [b], index of the record that was read.

  Raises:
    ValueError: an argument is out of range, or the source is empty.
    TooManyFailuresError: too many records cannot be read; raised by the iterator.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1")
  if start_step < 0:
    raise ValueError(f"start_step is {start_step}; expected at least 0")
  _check_names(transform)
  workers, pool = _workers(workers), ThreadPool(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  load_part = TrainPart(source, transform, seed, rows, pool)
  parts = grain.MapDataset.range(start_step * rows.parts, sys.maxsize).map(load_part)
  consequence = "another one takes its place"
  failures = FailureLog(source.name, len(source), max_failed_share, consequence, named)
  return Batches(parts, rows.parts, failures, pool, workers, prefetch)


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
  """Returns an iterator over evaluation batches, which are loaded in advance.

  The batches have each record (example) of the source once, in order. The last batch is padded to
  `batch_size`. Rows of padding and of unreadable records have `mask` False, label and index -1, and zeros
  in all other arrays.

  Args:
    source: examples.
    transform: function that fills one row of a batch from an example.
    batch_size: rows of the global batch; each host loads `batch_size / host_count` of them.
    workers: number of worker processes; 0 to load in this process, -1 for one per core.
    threads: number of threads that fill a batch in parallel, in this process or in each worker.
    host_index: index of this host, 0 to host_count - 1.
    host_count: number of hosts; each loads one block of rows of the global batch.
    max_failed_share: largest share of unreadable records, 0 to 1; up to ten are accepted in any case,
      unless the share is 0.
    named: error messages of unreadable records that were logged before. They are not logged again. New
      messages are added.
    prefetch: number of batches loaded in advance.

  Returns:
    Iterator of dicts, which closes itself after the last batch. Each dict has the arrays of the transform
    and three more, all with b = batch_size / host_count rows: label int32 [b], mask bool [b] and index
    int32 [b].

  Raises:
    ValueError: an argument is out of range, or the source is empty.
    TooManyFailuresError: too many records cannot be read; raised by the iterator.
  """
  _check_names(transform)
  workers, pool = _workers(workers), ThreadPool(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  load_part = EvaluationPart(source, transform, rows, pool)
  # Endless, so that no worker ends, and its shared memory with it, before the last batch is read.
  parts = grain.MapDataset.range(sys.maxsize).map(load_part)
  failures = FailureLog(source.name, len(source), max_failed_share, "it is left out", named)
  count = math.ceil(len(source) / batch_size)
  return Batches(parts, rows.parts, failures, pool, workers, prefetch, count)


def evaluation_images(
  source: Source, transform: Transform, *, workers: int = 0
) -> tuple[UInt8[np.ndarray, "n size size 3"], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
  """Loads the images of all readable records (examples) of a source into memory, in order.

  Args:
    source: examples.
    transform: transform that fills an array `image`, such as `Centre`.
    workers: number of worker processes; 0 to load in this process, -1 for one per core.

  Returns:
    Images, labels (-1 if unlabelled), and indices of the records in the source.

  Raises:
    ValueError: the source is empty, no record can be read, or an argument is out of range.
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


def _check_names(transform: Transform) -> None:
  if taken := sorted({"label", "index", "mask"} & set(transform.arrays)):
    raise ValueError(
      f"the transform declares {', '.join(taken)}; expected other names than label, index and mask, "
      "which the loader adds"
    )


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
  """Iterator over batches loaded in advance; close it when done, or use it in a with statement.

  Args:
    dataset: endless dataset of parts of batches, which starts with the first part of a batch.
    parts: number of parts that make up one batch.
    failures: log of unreadable records.
    pool: threads of this process that fill the parts.
    workers: number of worker processes, at least 0.
    prefetch: number of batches loaded in advance, at least 0.
    count: number of batches; None for an iterator without an end.

  Raises:
    ValueError: `prefetch` is negative.
  """

  def __init__(
    self,
    dataset: grain.MapDataset[LoadedPart],
    parts: int,
    failures: FailureLog,
    pool: ThreadPool,
    workers: int,
    prefetch: int,
    count: int | None = None,
  ):
    if prefetch < 0:
      raise ValueError(f"prefetch is {prefetch}; expected at least 0")
    one_thread_per_image()
    # grain's own reading threads are turned off: the prefetching thread or the workers below, and
    # the pool, are enough.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain passes its absl flags to the workers
      ahead = max(1, math.ceil(prefetch * parts / workers))
      options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
      dataset = WithOptionsIterDataset(dataset, DatasetOptions(min_shm_size=_SHARED_BYTES))
      dataset = dataset.mp_prefetch(options, worker_init_fn=start_worker)
    else:
      dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    self._parts = parts
    self._steps = itertools.count() if count is None else iter(range(count))
    self._reader = BufferReader()
    self._running = [pool, iter(dataset)]  # in reverse order of closing; empty once closed
    self._failures = failures
    self._finalizer = weakref.finalize(self, _close_all, self._running)

  def __next__(self) -> Batch:
    """Returns the next batch.

    If an error occurred while the batch was loaded, the iterator is closed and the error is raised here.
    """
    if not self._running:
      raise StopIteration
    try:
      next(self._steps)
      parts = list(itertools.islice(self._running[-1], self._parts))
      batch, failures = join(parts, self._reader)
      self._failures.add(batch["index"], failures)
    except BaseException:
      self.close()
      raise
    return batch

  def close(self) -> None:
    """Stops the threads and worker processes, and waits until they end; further calls do nothing."""
    self._finalizer()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _close_all(running: list[ThreadPool | grain.DatasetIterator]) -> None:
  while running:
    running.pop().close()
