"""Batches: which records a step takes, with which random numbers, made where.

Everything about a batch is a function of (source, settings, seed, step). Epoch e visits the records
in the order `epoch_order(seed, e)`; the stream of all epochs is cut into batches of exactly
`batch_size`, across the ends of epochs; the random numbers of a view come from `view_generator`
(seed, epoch, record, view). So neither the number of hosts, workers or devices nor a restart
changes what is trained on, and any view can be drawn again.

grain runs the work: step -> batch is a `grain.MapDataset`, evaluated ahead of time in a thread or
in worker processes. Its elements are steps rather than records because its bookkeeping per element
costs as much as a view of a small image.

Files that cannot be read do not stop a run: see `failures`.
"""

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags
from grain.experimental import (
  DatasetOptions,
  ThreadPrefetchIterDataset,
  WithOptionsIterDataset,
)
from jaxtyping import Int32, UInt8

from byolx.data.augment import Draws, ViewSpec, crop_and_resize, draw, evaluation_view
from byolx.data.augment_host import apply_host
from byolx.data.decode import DecodeError
from byolx.data.failures import Failure, FailureLog, TooManyFailuresError
from byolx.data.sources import Example, Source

PLACEMENTS = ("host", "device")

_REPLACEMENTS = 1000
"""After so many unreadable records in a row the source is given up."""

_SHARED_BYTES = 2**16
"""Smaller arrays come from workers through a pipe: each segment of shared memory is a file."""

Batch = dict[str, Any]


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
    workers: processes that make batches; 0 is a thread of this process.
    host_index, host_count: this host's rows are host_index, host_index + host_count, ... of the
      global batch.
    max_failed_share: more unreadable records than this share stop the run, see `failures`.
    named: unreadable records that were named before, see `FailureLog`.
    prefetch: batches made ahead of time (by each worker); 0 makes them when asked, in the caller.

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
  rows = _rows(source, batch_size, host_index, host_count)
  make = _TrainBatch(source, tuple(views), size, seed, rows, placement, antialias)
  steps = grain.MapDataset.range(start_step, sys.maxsize)
  consequence = "another one takes its place"
  failures = FailureLog(source.name, len(source), max_failed_share, consequence, named)
  return Batches(steps.map(make), failures, workers, prefetch)


def evaluation_batches(
  source: Source,
  size: int,
  resize: int,
  rule: str,
  batch_size: int,
  *,
  workers: int = 0,
  host_index: int = 0,
  host_count: int = 1,
  max_failed_share: float = 0.01,
  named: set[str] | None = None,
  prefetch: int = 2,
) -> "Batches":
  """Every record once, in order, as the view that evaluation uses (`augment.evaluation_view`).

  The last batch is padded to `batch_size`. Padding and unreadable files are rows whose `mask` is
  False; they have a black image, label -1 and index -1.

  Args: as for `train_batches`; `size`, `resize`, `rule` as for `evaluation_view`.

  Returns:
    An iterator of dicts: image uint8 [b size size 3], label int32 [b], mask bool [b], index int32
    [b]. It closes itself at the end; otherwise as for `train_batches`.
  """
  evaluation_view(np.zeros((1, 1, 3), np.uint8), size, resize, rule)  # raises now if ever
  rows = _rows(source, batch_size, host_index, host_count)
  make = _EvaluationBatch(source, size, resize, rule, rows)
  steps = grain.MapDataset.range(math.ceil(len(source) / batch_size))
  failures = FailureLog(source.name, len(source), max_failed_share, "it is left out", named)
  return Batches(steps.map(make), failures, workers, prefetch)


def evaluation_images(
  source: Source, size: int, resize: int, rule: str, *, workers: int = 0
) -> tuple[UInt8[np.ndarray, "n size size 3"], Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
  """All readable records in order: (images, labels, indices). For sources that fit into memory.

  Raises:
    ValueError: as `evaluation_batches`, or if no record can be read.
  """
  batch_size = max(1, min(len(source), 256))
  with evaluation_batches(source, size, resize, rule, batch_size, workers=workers) as batches:
    parts = [
      tuple(batch[key][batch["mask"]] for key in ("image", "label", "index")) for batch in batches
    ]
  images, labels, indices = (np.concatenate(part) for part in zip(*parts))
  if not len(images):
    raise ValueError(f"{source.name}: no record can be read; expected images")
  return images, labels, indices


# 1. Randomness: Philox counters are (draw, purpose, epoch, view) under the key (seed, record).

_VIEW, _ORDER, _REPLACEMENT = range(3)


def view_generator(seed: int, epoch: int, record: int, view: int) -> np.random.Generator:
  """The generator that draws view 0, 1, ... of a record in an epoch, and nothing else."""
  return _Stream(seed).at(_VIEW, record, epoch, view)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int32[np.ndarray, "count"]:
  """The order in which an epoch visits `count` records: a permutation, read-only."""
  order = _Stream(seed).at(_ORDER, 0, epoch).permutation(count).astype(np.int32)
  order.flags.writeable = False
  return order


class _Stream:
  """One generator that is moved from place to place, ten times faster than making new ones."""

  def __init__(self, seed: int):
    self._seed = seed
    self._generator = np.random.Generator(np.random.Philox(key=0))

  def at(self, purpose: int, record: int, epoch: int = 0, view: int = 0) -> np.random.Generator:
    self._generator.bit_generator.state = {
      "bit_generator": "Philox",
      "state": {"key": (self._seed, record), "counter": (0, purpose, epoch, view)},
      "buffer": (0, 0, 0, 0),
      "buffer_pos": 4,
      "has_uint32": 0,
      "uinteger": 0,
    }
    return self._generator


# 2. Making one batch. These objects are what worker processes are given.


@dataclass(frozen=True)
class _Rows:
  """Which places of the stream of records a step takes on this host."""

  records: int
  batch_size: int
  host_index: int
  host_count: int

  @property
  def local(self) -> int:
    return self.batch_size // self.host_count

  def of(self, step: int) -> range:
    """Places in the stream; place p is number p % records of epoch p // records."""
    first = step * self.batch_size
    return range(first + self.host_index, first + self.batch_size, self.host_count)


def _rows(source: Source, batch_size: int, host_index: int, host_count: int) -> _Rows:
  if not len(source):
    raise ValueError(f"{source.name} is empty; expected at least one record")
  if not 0 <= host_index < host_count:
    raise ValueError(f"host_index is {host_index} of {host_count}; expected 0 <= index < count")
  if batch_size < 1 or batch_size % host_count:
    raise ValueError(
      f"batch_size is {batch_size}; expected a positive multiple of {host_count} hosts"
    )
  return _Rows(len(source), batch_size, host_index, host_count)


class _Made(NamedTuple):
  """A batch and the unreadable records that came up in making it."""

  batch: Batch
  failures: tuple[Failure, ...]


class _TrainBatch:
  """step -> _Made for `train_batches`."""

  def __init__(self, source, views, size, seed, rows, placement, antialias):
    self._source = source
    self._views = views
    self._size = size
    self._seed = seed
    self._rows = rows
    self._on_host = placement == "host"
    self._antialias = antialias
    self._stream = _Stream(seed)

  def __call__(self, step: int) -> _Made:
    local, size = self._rows.local, self._size
    images = [np.empty((local, size, size, 3), np.uint8) for _ in self._views]
    draws = [[] for _ in self._views]
    label, index = np.empty(local, np.int32), np.empty(local, np.int32)
    failures = []
    for row, place in enumerate(self._rows.of(step)):
      epoch, number = divmod(place, self._rows.records)
      record = int(epoch_order(self._seed, epoch, self._rows.records)[number])
      example, index[row] = self._read(record, failures)
      label[row] = example.label
      height, width = example.image.shape[:2]
      for view, spec in enumerate(self._views):
        drawn = draw(spec, self._stream.at(_VIEW, record, epoch, view), height, width)
        image = crop_and_resize(example.image, drawn.crop, size, self._antialias)
        if self._on_host:
          images[view][row] = apply_host(image, drawn, spec.brightness_rule)
        else:
          images[view][row] = image
          draws[view].append(drawn)
    batch: Batch = {"label": label, "index": index}
    for view in range(len(self._views)):
      batch[f"view{view + 1}"] = images[view]
      if not self._on_host:
        batch[f"draws{view + 1}"] = Draws(*map(np.stack, zip(*draws[view])))
    return _Made(batch, tuple(failures))

  def _read(self, record: int, failures: list[Failure]) -> tuple[Example, int]:
    """The record, or a readable one in its place, which depends on seed and record only."""
    count = self._rows.records
    try:
      return self._source[record], record
    except DecodeError as error:
      failures.append(Failure(record, str(error)))
    # Stepping by a number without a common divisor visits every other record before the first
    # comes again.
    stride = int(self._stream.at(_REPLACEMENT, record).integers(1, max(count, 2)))
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


class _EvaluationBatch:
  """step -> _Made for `evaluation_batches`."""

  def __init__(self, source, size, resize, rule, rows):
    self._source = source
    self._view = (size, resize, rule)
    self._rows = rows

  def __call__(self, step: int) -> _Made:
    local, size = self._rows.local, self._view[0]
    image = np.zeros((local, size, size, 3), np.uint8)
    label, index = np.full(local, -1, np.int32), np.full(local, -1, np.int32)
    mask = np.zeros(local, bool)
    failures = []
    for row, record in enumerate(self._rows.of(step)):
      if record >= self._rows.records:
        break
      try:
        example = self._source[record]
      except DecodeError as error:
        failures.append(Failure(record, str(error)))
        continue
      image[row] = evaluation_view(example.image, *self._view)
      label[row], index[row], mask[row] = example.label, record, True
    batch = {"image": image, "label": label, "mask": mask, "index": index}
    return _Made(batch, tuple(failures))


# 3. Running ahead.


class Batches(Iterator[Batch]):
  """Iterator over batches that are made ahead of time; close it when done, or use `with`."""

  def __init__(
    self,
    steps: grain.MapDataset,
    failures: FailureLog,
    workers: int,
    prefetch: int,
  ):
    if workers < 0 or prefetch < 0:
      raise ValueError(f"workers is {workers}, prefetch is {prefetch}; expected at least 0")
    _one_thread_per_image()
    # No threads inside: the thread or the workers below are the only ones.
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain hands its flags on to the workers
      options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(prefetch, 1))
      dataset = WithOptionsIterDataset(dataset, DatasetOptions(min_shm_size=_SHARED_BYTES))
      dataset = dataset.mp_prefetch(options, worker_init_fn=_one_thread_per_image)
    else:
      dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    self._running = [iter(dataset)]  # empty once closed
    self._failures = failures
    self._finalizer = weakref.finalize(self, _close_all, self._running)

  def __next__(self) -> Batch:
    """The next batch. An error that was raised in making it is raised here, and closes."""
    if not self._running:
      raise StopIteration
    try:
      batch, failures = next(self._running[0])
      self._failures.add(batch["index"], failures)
    except BaseException:
      self.close()
      raise
    return batch

  def close(self) -> None:
    """Stops the thread or the workers and waits for their end. May be called again."""
    self._finalizer()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _close_all(running: list[grain.DatasetIterator]) -> None:
  while running:
    running.pop().close()


def _one_thread_per_image(*_) -> None:
  """OpenCV's own threads only get into the way of many small images."""
  cv2.setNumThreads(0)
