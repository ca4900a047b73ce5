"""Making batches: from the numbers of records to arrays of views.

The objects here are what worker processes are given. They map the number of a part of a batch to
that part, whoever asks and in whatever order; see `order` for which records are in it.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import threadpoolctl
from grain.multiprocessing import SharedMemoryArray

from byolx.data.augment import Draws, ViewSpec, crop_and_resize, draw, evaluation_view
from byolx.data.augment_host import apply_host
from byolx.data.decode import DecodeError
from byolx.data.failures import Failure, TooManyFailuresError
from byolx.data.order import REPLACEMENT, VIEW, Rows, Stream, epoch_order
from byolx.data.sources import Example, Source
from byolx.machine import end_with_parent

Batch = dict[str, Any]

_REPLACEMENTS = 1000
"""After so many unreadable records in a row the source is given up."""

SHARED_BYTES = 2**16
"""Smaller arrays come from workers through a pipe: each segment of shared memory is a file."""

_in_worker = False


class Made(NamedTuple):
  """A part of a batch and the unreadable records that came up in making it."""

  batch: Batch
  failures: tuple[Failure, ...]


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
  """Number of a part -> Made, for `pipeline.train_batches`."""

  def __init__(
    self,
    source: Source,
    views: Sequence[ViewSpec],
    size: int,
    seed: int,
    rows: Rows,
    placement: str,
    antialias: bool,
    crew: Crew,
  ):
    self._source = source
    self._views = tuple(views)
    self._size = size
    self._seed = seed
    self._rows = rows
    self._on_host = placement == "host"
    self._antialias = antialias
    self._crew = crew

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count, size = len(places), self._size
    label, index = np.empty(count, np.int32), np.empty(count, np.int32)
    images = [_pixels(count, size, size, 3) for _ in self._views]
    draws: list[list] = [[None] * count for _ in self._views]

    def fill(rows: range) -> list[Failure]:
      stream, failures = Stream(self._seed), []
      for row in rows:
        epoch, place = divmod(places[row], self._rows.records)
        record = int(epoch_order(self._seed, epoch, self._rows.records)[place])
        example, index[row] = self._read(record, stream, failures)
        label[row] = example.label
        height, width = example.image.shape[:2]
        for view, spec in enumerate(self._views):
          drawn = draw(spec, stream.at(VIEW, record, epoch, view), height, width)
          image = crop_and_resize(example.image, drawn.crop, size, self._antialias)
          if self._on_host:
            image = apply_host(image, drawn, spec.brightness_rule)
          images[view][row] = image
          draws[view][row] = drawn
      return failures

    failures = _fill_or_free(self._crew, count, fill, images)
    batch: Batch = {"label": label, "index": index}
    for view, (pixels, drawn) in enumerate(zip(images, draws, strict=True), start=1):
      batch[f"view{view}"] = pixels
      if not self._on_host:
        batch[f"draws{view}"] = Draws(*map(np.stack, zip(*drawn)))
    return Made(batch, failures)

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
  """Number of a part -> Made, for `pipeline.evaluation_batches`."""

  def __init__(self, source: Source, size: int, resize: int, rule: str, rows: Rows, crew: Crew):
    self._source = source
    self._view = (size, resize, rule)
    self._rows = rows
    self._crew = crew

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count, size = len(places), self._view[0]
    image = _pixels(count, size, size, 3)
    label, index = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    mask = np.zeros(count, bool)

    def fill(rows: range) -> list[Failure]:
      failures = []
      for row in rows:
        record = places[row]
        image[row] = 0
        if record >= self._rows.records:
          continue
        try:
          example = self._source[record]
        except DecodeError as error:
          failures.append(Failure(record, str(error)))
          continue
        image[row] = evaluation_view(example.image, *self._view)
        label[row], index[row], mask[row] = example.label, record, True
      return failures

    failures = _fill_or_free(self._crew, count, fill, [image])
    return Made({"image": image, "label": label, "mask": mask, "index": index}, failures)


def join(parts: Sequence[Made]) -> Made:
  """One batch of its parts, in order."""
  if len(parts) == 1:
    return parts[0]
  batch = {}
  for key, first in parts[0].batch.items():
    values = [part.batch[key] for part in parts]
    batch[key] = (
      Draws(*map(np.concatenate, zip(*values)))
      if isinstance(first, Draws)
      else (np.concatenate(values))
    )
  return Made(batch, tuple(failure for part in parts for failure in part.failures))


def start_worker(*_) -> None:
  """Settles a worker process: it writes into shared memory, and ends when its parent does."""
  global _in_worker
  _in_worker = True
  end_with_parent()
  one_thread_per_image()
  threadpoolctl.threadpool_limits(1)


def one_thread_per_image() -> None:
  """OpenCV's own threads only get into the way of many small images."""
  cv2.setNumThreads(0)


def _pixels(*shape: int) -> np.ndarray:
  """Uninitialised uint8, in a worker process where the training process can reach it."""
  if _in_worker and math.prod(shape) >= SHARED_BYTES:
    return SharedMemoryArray(shape, np.uint8)
  return np.empty(shape, np.uint8)


def _fill_or_free(crew, count, fill, images):
  """Fills the rows; gives shared memory back if that fails, since nobody else will."""
  try:
    return crew.fill(count, fill)
  except BaseException:
    for image in images:
      if isinstance(image, SharedMemoryArray):
        image.unlink_on_del()
    raise
