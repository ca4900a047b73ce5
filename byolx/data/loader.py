"""Batches, made ahead of time in threads or worker processes.

Everything about a batch is a function of (source, settings, seed, step): `order` says which records
are in it and from which random numbers, `making` turns them into arrays. So neither the number of
hosts, workers, threads or devices nor a restart changes what is trained on, and any view can be
drawn again.

grain runs the work: part of a batch -> arrays is a `grain.MapDataset`. Its elements are parts of
batches rather than records because its bookkeeping per element costs as much as a view of a small
image. Worker processes write pixels into memory that the training process reads in place, see `lending`.

Files that cannot be read do not stop a run: see `failures`.
"""

import itertools
import math
import sys
import weakref
from collections.abc import Iterator, Sequence

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
from byolx.data.augment.distribution import ViewSpec
from byolx.data.augment.resizing import evaluation_view
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
from byolx.data.unreadable import FailureLog

PLACEMENTS = ("host", "device")

_SHARED_BYTES = 2**16
"""Smaller arrays come from workers through a pipe: each array in shared memory is a file."""

PART_ROWS = 128
"""Worker processes make larger batches in parts of about so many rows: their memory stays small."""


def train_batches(
  source: Source,
  views: Sequence[ViewSpec],
  size: int,
  batch_size: int,
  seed: int,
  *,
  start_step: int = 0,
  placement: str = "host",
  antialias: bool = False,
  workers: int = 0,
  threads: int = 1,
  host_index: int = 0,
  host_count: int = 1,
  max_failed_share: float = 0.01,
  named: set[str] | None = None,
  prefetch: int = 2,
) -> "Batches":
  """Endless batches of views, one view per `ViewSpec`.

  Args:
    source: the examples.
    views: the distribution of each view: two for BYOL, any number works.
    size: side of a view in pixels.
    batch_size: of the global batch; every host yields `batch_size / host_count` rows.
    seed: 0 to 2**32 - 1.
    start_step: the first batch is that of this step: pass the step of a restored state.
    placement: 'host' applies a view's whole augmentation here; 'device' only crops and adds the
      draws, for `apply_device` inside the jitted step.
    antialias: whether shrinking a crop is antialiased.
    workers: processes that make batches; 0 makes them in this process, -1 is one per core.
    threads: that make a batch side by side, in this process or in each worker. Decoding and
      resizing release the interpreter; what lies between them does not.
    host_index, host_count: this host's rows are block host_index of the global batch, cut into
      host_count blocks.
    max_failed_share: more unreadable records than this share stop the run, see `failures`.
    named: unreadable records that were named before, see `FailureLog`.
    prefetch: batches made ahead of time; 0 makes them when asked, in the caller.

  Returns:
    An iterator of dicts; call its `close()`, or use it in a with statement:
      view1, view2, ...: uint8 [b size size 3].
      label: int32 [b], -1 if unlabelled.
      index: int32 [b], the record whose pixels these are.
      draws1, draws2, ... (device placement only): `Draws` with a leading axis b.

  Raises:
    ValueError: a setting is outside its range; later, from the iterator, too many unreadable files.
  """
  if placement not in PLACEMENTS:
    raise ValueError(f"placement is {placement!r}; expected one of {', '.join(PLACEMENTS)}")
  if not views:
    raise ValueError("no view was given; expected at least one ViewSpec")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1")
  if start_step < 0:
    raise ValueError(f"start_step is {start_step}; expected at least 0")
  if size < 1:
    raise ValueError(f"size is {size}; expected at least 1")
  workers, crew = _workers(workers), Crew(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  make = TrainPart(source, views, size, seed, rows, placement, antialias, crew)
  parts = grain.MapDataset.range(start_step * rows.parts, sys.maxsize).map(make)
  consequence = "another one takes its place"
  failures = FailureLog(source.name, len(source), max_failed_share, consequence, named)
  return Batches(parts, rows.parts, failures, crew, workers, prefetch)


def evaluation_batches(
  source: Source,
  size: int,
  resize: int,
  rule: str,
  batch_size: int,
  *,
  antialias: bool = False,
  workers: int = 0,
  threads: int = 1,
  host_index: int = 0,
  host_count: int = 1,
  max_failed_share: float = 0.01,
  named: set[str] | None = None,
  prefetch: int = 2,
) -> "Batches":
  """Every record once, in order, as the view that evaluation uses (`resizing.evaluation_view`).

  The last batch is padded to `batch_size`. Padding and unreadable files are rows whose `mask` is
  False; they have a black image, label -1 and index -1.

  Args: as for `train_batches`; `size`, `resize`, `rule`, `antialias` as for `evaluation_view`.

  Returns:
    An iterator of dicts: image uint8 [b size size 3], label int32 [b], mask bool [b], index int32
    [b]. It closes itself at the end; otherwise as for `train_batches`.
  """
  black = np.zeros((1, 1, 3), np.uint8)
  evaluation_view(black, size, resize, rule, antialias)  # raises now if ever
  workers, crew = _workers(workers), Crew(threads)
  rows = _rows(source, batch_size, host_index, host_count, workers)
  make = EvaluationPart(source, size, resize, rule, antialias, rows, crew)
  # Without an end, as a worker that comes to its end takes with it the memory that it lends.
  parts = grain.MapDataset.range(sys.maxsize).map(make)
  failures = FailureLog(source.name, len(source), max_failed_share, "it is left out", named)
  count = math.ceil(len(source) / batch_size)
  return Batches(parts, rows.parts, failures, crew, workers, prefetch, count)


def evaluation_images(
  source: Source, size: int, resize: int, rule: str, *, antialias: bool = False, workers: int = 0
) -> tuple[UInt8[np.ndarray, "n size size 3"], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
  """All readable records in order: (images, labels, indices). For sources that fit into memory.

  Raises:
    ValueError: as `evaluation_batches`, or if no record can be read.
  """
  batch_size = max(1, min(len(source), 256))
  settings = {"antialias": antialias, "workers": workers}
  with evaluation_batches(source, size, resize, rule, batch_size, **settings) as batches:
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
