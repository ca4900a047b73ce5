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
from jaxtyping import UInt8

from byolx.core.machine import end_with_parent
from byolx.data.augment import randaugment
from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.resizing import crop_and_resize, evaluation_view
from byolx.data.decode import DecodeError
from byolx.data.sampler import RANDAUGMENT, REPLACEMENT, VIEW, Rows, Stream, epoch_order
from byolx.data.shared_memory import Borrower, Lender, Loan
from byolx.data.sources.base import Example, Source
from byolx.data.unreadable import Failure, TooManyFailuresError

Batch = dict[str, Any]

_REPLACEMENTS = 1000
"""After so many unreadable records in a row the source is given up."""


class Made(NamedTuple):
  """A part of a batch and the unreadable records that came up in making it.

  Attributes:
    names: of the images in the batch: view1, view2, or image.
    pixels: all of them, or a loan of them.
    rest: what else is in the batch.
    failures: in the order of rows.
  """

  names: tuple[str, ...]
  pixels: UInt8[np.ndarray, "names b size size 3"] | Loan
  rest: Batch
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
  """Number of a part -> Made, for `loader.train_batches`."""

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
    self._lender = Lender()

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count, size = len(places), self._size
    label, index = np.empty(count, np.int32), np.empty(count, np.int32)
    images, sent = self._lender.take(len(self._views), count, size, size, 3)
    draws: list[list] = [[None] * count for _ in self._views]

    def fill(rows: range) -> list[Failure]:
      stream, failures = Stream(self._seed), []
      for row in rows:
        epoch, place = divmod(places[row], self._rows.records)
        record = int(epoch_order(self._seed, epoch, self._rows.records)[place])
        example, index[row] = self._read(record, stream, failures)
        label[row] = example.label
        for view, spec in enumerate(self._views):
          place, out = (record, epoch, view), images[view, row]
          draws[view][row] = make_view(
            example.image, spec, stream, place, out, self._antialias, self._on_host
          )
      return failures

    failures = self._crew.fill(count, fill)
    numbers = range(1, len(self._views) + 1)
    rest: Batch = {"label": label, "index": index}
    if not self._on_host:
      for view, drawn in zip(numbers, draws, strict=True):
        rest[f"draws{view}"] = Draws(*map(np.stack, zip(*drawn)))
    return Made(tuple(f"view{view}" for view in numbers), sent, rest, failures)

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


def make_view(
  image: UInt8[np.ndarray, "h w 3"],
  spec: ViewSpec,
  stream: Stream,
  place: tuple[int, int, int],
  out: UInt8[np.ndarray, "size size 3"],
  antialias: bool,
  on_host: bool = True,
) -> Draws:
  """Makes one view of an image: a function of seed and place, wherever and whenever it is made.

  Args:
    image: any size.
    spec: what is drawn from.
    stream: of the seed.
    place: record, epoch, number of the view.
    out: takes the view.
    antialias: whether shrinking is antialiased.
    on_host: False leaves all that follows the crop to the device.

  Returns:
    What was drawn; RandAugment's part not among it.
  """
  drawn = draw(spec, stream.at(VIEW, *place), *image.shape[:2])
  crop_and_resize(image, drawn.crop, len(out), antialias, out)
  if on_host:
    out[:] = apply_host(out, drawn, spec.brightness_rule)
    if spec.randaugment is not None:
      chosen = randaugment.draw(spec.randaugment, stream.at(RANDAUGMENT, *place))
      out[:] = randaugment.apply(out, chosen, spec.randaugment.interpolation)
  return drawn


class EvaluationPart:
  """Number of a part -> Made, for `loader.evaluation_batches`."""

  def __init__(
    self,
    source: Source,
    size: int,
    resize: int,
    rule: str,
    antialias: bool,
    rows: Rows,
    crew: Crew,
  ):
    self._source = source
    self._view = (size, resize, rule, antialias)
    self._rows = rows
    self._crew = crew
    self._lender = Lender()

  def __call__(self, number: int) -> Made:
    places = self._rows.of(number)
    count, size = len(places), self._view[0]
    (image,), sent = self._lender.take(1, count, size, size, 3)
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

    failures = self._crew.fill(count, fill)
    return Made(("image",), sent, {"label": label, "mask": mask, "index": index}, failures)


def join(parts: Sequence[Made], borrower: Borrower) -> tuple[Batch, tuple[Failure, ...]]:
  """One batch of its parts, in order, and what failed in them; a single part is not copied."""
  pixels = [borrower.open(part.pixels) for part in parts]
  batch = {
    name: _concatenated([images[i] for images in pixels]) for i, name in enumerate(parts[0].names)
  }
  for key in parts[0].rest:
    batch[key] = _concatenated([part.rest[key] for part in parts])
  return batch, tuple(failure for part in parts for failure in part.failures)


def _concatenated(values):
  if len(values) == 1:
    return values[0]
  if isinstance(values[0], Draws):
    return Draws(*map(np.concatenate, zip(*values)))
  return np.concatenate(values)


def start_worker(*_) -> None:
  """Settles a worker process: it uses one core, and ends when its parent does."""
  end_with_parent()
  one_thread_per_image()
  threadpoolctl.threadpool_limits(1)


def one_thread_per_image() -> None:
  """OpenCV's own threads only get into the way of many small images."""
  cv2.setNumThreads(0)
