"""`byolx bench input`: measures how fast images can be loaded, and for how many TPU cores they suffice.

All measurements use the config's images, in the order of the first epoch. The first measurement
times each stage of loading, such as decoding, in one thread. The second one times only the bare
functions decode, crop and resize, without the loader. It includes the colour augmentations if the
host (CPU) applies them. The bare functions read bytes in memory, and their speed serves as the upper
limit of the loader's speed. The third measurement times the loader itself, in this process and in
worker processes. The second and the third measurement alternate, because the speed of a machine
changes with time.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from byolx.core import sharding
from byolx.core.machine import usable_cores
from byolx.data import batching, decode, loader
from byolx.data.augment import distribution, resizing
from byolx.data.augment.on_host import apply_host
from byolx.data.sampler import VIEW, Stream, epoch_order
from byolx.data.sources.base import EncodedSource, Example, Source
from byolx.data.transforms import Random, Transform, Views, empty_rows
from byolx.data.unreadable import TooManyFailuresError
from byolx.models.resnet import ResNet
from byolx.planning import tpu
from byolx.runs import trainer
from byolx.runs.images import build_sources

SAMPLE = 512
"""Maximal number of images that are measured; their encoded bytes are held in memory."""

ROUNDS = 3
"""Number of repetitions of each measurement of images per second; the report shows the medians."""

V3_CORE_FLOPS = tpu.GENERATIONS["v3"].flops
"""Peak bfloat16 operations per second of a TPU v3 core."""

UTILISATION = 0.3
"""Share of a TPU's peak rate that a fast train step of a ResNet is expected to reach."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """Time that one stage of loading images takes in one thread.

  Args:
    name: name of the stage, such as decode.
    ms_per_image: milliseconds per image. This is the time for all views (augmented crops) of it.
  """

  name: str
  ms_per_image: float


@dataclasses.dataclass(frozen=True)
class Rate:
  """Speed of the image loader with a certain number of worker processes.

  It is compared with the speed of the bare functions decode, crop and resize without the loader.

  Args:
    workers: number of worker processes; 0 means that this process loads the images.
    images_per_second: images per second. An image counts once for all its views (augmented crops).
    per_core: images per second, divided by the number of CPU cores that the workers use.
    of_limit: `per_core`, divided by the speed of the bare functions in one process.
    of_shared_limit: `images_per_second`, divided by the speed of the bare functions in the same
      number of processes. These processes run at once and share the machine's memory.
  """

  workers: int
  images_per_second: float
  per_core: float
  of_limit: float
  of_shared_limit: float


@dataclasses.dataclass(frozen=True)
class InputReport:
  """Result of `byolx bench input`: speed of loading a config's images on this machine.

  Args:
    source: name of the image source.
    records: number of training images.
    size: side of a view, an augmented crop, in pixels.
    placement: place of the colour augmentation: `host` (CPU) or `device` (accelerator).
    batch_size: number of images in a train step.
    cores: number of CPU cores that this process may use.
    stages: times of the stages of loading, such as decoding.
    limit_images_per_second: images per second of the bare functions (decode, crop and resize,
      without the loader) in one process.
    rates: speeds of the loader, one for each measured number of worker processes.
    gflop_per_image: floating-point operations of a train step per image, in units of 1e9.
    tpu_v3_cores: estimated number of TPU v3 cores for which the fastest measured loader delivers
      enough images. Each core is assumed to reach the share UTILISATION of its peak rate.
  """

  source: str
  records: int
  size: int
  placement: str
  batch_size: int
  cores: int
  stages: tuple[Stage, ...]
  limit_images_per_second: float
  rates: tuple[Rate, ...]
  gflop_per_image: float
  tpu_v3_cores: float

  @property
  def best(self) -> Rate:
    """The highest of the loader's measured speeds."""
    return max(self.rates, key=lambda rate: rate.images_per_second)

  def text(self) -> str:
    """Returns the report as text, with a table of the stages and one of the loader's speeds."""
    bare = "decode, crop, resize" + (", colour" if self.placement == "host" else "")
    lines = [
      f"{self.source}: {self.records:,} records, views of {self.size} px, colours on the"
      f" {self.placement}, {self.cores} cores",
      "",
      f"{'one image through all its views, one thread':<46}{'ms':>8}{'images/s':>12}",
      *(
        f"  {stage.name:<44}{stage.ms_per_image:8.3f}{1e3 / max(stage.ms_per_image, 1e-6):12,.0f}"
        for stage in self.stages
      ),
      f"{'limit: ' + bare + ', bare functions':<46}{1e3 / self.limit_images_per_second:8.3f}"
      f"{self.limit_images_per_second:12,.0f}",
      "",
      f"{'the pipeline':<22}{'images/s':>12}{'per core':>12}{'of the limit':>15}"
      f"{'of as many bare':>18}",
      *(
        f"  {_place(rate.workers):<20}{rate.images_per_second:12,.0f}{rate.per_core:12,.0f}"
        f"{rate.of_limit:15.1%}{rate.of_shared_limit:18.1%}"
        for rate in self.rates
      ),
      "",
      f"this host feeds {self.best.images_per_second / self.batch_size:.3g} steps/s of"
      f" {self.batch_size:,} images, {_place(self.best.workers)}:",
      f"enough for {self.tpu_v3_cores:.1f} TPU v3 cores at this config ({self.gflop_per_image:.1f}"
      f" GFLOP an image, cores at {UTILISATION:.0%} of {V3_CORE_FLOPS / 1e12} TFLOP/s)",
    ]
    return "\n".join(lines)


def measure_input(cfg: ConfigDict, workers: Sequence[int], seconds: float) -> InputReport:
  """Measures how fast this machine loads a config's images.

  Args:
    cfg: config with all fields.
    workers: numbers of worker processes to measure; 0 means that this process loads the images.
    seconds: duration of one measurement in seconds. There are at most
      1 + ROUNDS * (1 + 2 * len(workers)) measurements.

  Raises:
    ConfigError: there are no images, or fields contradict each other.
    TooManyFailuresError: no image can be read.
  """
  source = build_sources(cfg).train
  work = Work.of(cfg, source)
  batching.one_thread_per_image()
  stages = _stages(cfg, work, seconds)
  bare = functools.partial(_run_bare, work)
  limits, speeds = [], {count: [] for count in workers}
  shared_limits = {count: [] for count in workers}
  for _ in range(ROUNDS):
    limits.append(bare(seconds))
    for count in workers:
      speeds[count].append(_run_pipeline(cfg, source, count, seconds))
      shared_limit = _run_side_by_side(work, count, seconds) if count > 1 else limits[-1]
      shared_limits[count].append(shared_limit)
  limit = statistics.median(limits)
  rates = [
    _rate(count, statistics.median(speeds[count]), limit, statistics.median(shared_limits[count]))
    for count in workers
  ]
  flops = step_flops_per_image(cfg)
  best = max(rate.images_per_second for rate in rates)
  return InputReport(
    source.name,
    len(source),
    cfg.views.size,
    cfg.views.placement,
    cfg.train.batch_size,
    usable_cores(),
    stages,
    limit,
    tuple(rates),
    flops / 1e9,
    best * flops / (UTILISATION * V3_CORE_FLOPS),
  )


def step_flops_per_image(cfg: ConfigDict) -> float:
  """Estimates the floating-point operations of a train step per image, as 8 forward passes.

  Each of the two views (augmented crops) costs four passes: one of the online network, one of the
  target network, and two for the gradient. The operations of one pass are jax's count for the
  encoder with one image. Projector, predictor and optimiser are left out.
  """
  spec = trainer.build_encoder(cfg)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: ResNet(spec, rngs=nnx.Rngs(0))))
  image = jax.ShapeDtypeStruct((1, cfg.views.size, cfg.views.size, 3), jnp.float32)

  def forward(state, x):
    return nnx.merge(graphdef, state, copy=True)(x, train=False)

  return 8 * jax.jit(forward).lower(state, image).cost_analysis()["flops"]


@dataclasses.dataclass(frozen=True)
class Work:
  """Images with which loading is measured, and the transform that makes views of them.

  A view is an augmented crop.

  Args:
    source: training images.
    transform: transform of the training images, such as crops and augmentations.
    seed: seed of the run.
    records: indices of the measured images in `source`.
    encoded: bytes of the file of each measured image. They are b"" if the source has decoded pixels.
    draws: random augmentation parameters of each measured image, one element per view. They are
      an empty tuple if the transform makes no views.
  """

  source: Source
  transform: Transform
  seed: int
  records: tuple[int, ...]
  encoded: tuple[bytes, ...]
  draws: tuple[tuple[distribution.Draws, ...], ...]

  @classmethod
  def of(cls, cfg: ConfigDict, source: Source) -> "Work":
    """Creates a Work with the first readable images of the first epoch, at most SAMPLE images.

    Args:
      cfg: config with all fields.
      source: training images.

    Raises:
      TooManyFailuresError: no image can be read.
    """
    transform, stream = trainer.build_input(cfg, len(source.classes)), Stream(cfg.seed)
    specs = transform.specs if isinstance(transform, Views) else ()
    records, encoded, draws, unreadable = [], [], [], ""
    for record in epoch_order(cfg.seed, 0, len(source)).tolist():
      try:
        height, width = source[record].image.shape[:2]
      except decode.DecodeError as error:
        unreadable = str(error)
        continue
      records.append(record)
      encoded.append(source.encoded(record)[0] if isinstance(source, EncodedSource) else b"")
      draws.append(
        tuple(
          distribution.draw(spec, stream.at(VIEW, record, 0, view), height, width)
          for view, spec in enumerate(specs)
        )
      )
      if len(records) == SAMPLE:
        break
    if not records:
      raise TooManyFailuresError(
        f"{source.name}: none of {len(source)} records can be read, the last one being"
        f" {unreadable}; expected images"
      )
    return cls(source, transform, cfg.seed, tuple(records), tuple(encoded), tuple(draws))

  @property
  def on_host(self) -> bool:
    """Whether the host (CPU) augments colours. If so, this is one of the measured stages."""
    return isinstance(self.transform, Views) and not self.transform.on_device

  def image(self, i: int) -> np.ndarray:
    """Returns the decoded pixels of measured image i, uint8[height, width, 3]."""
    if self.encoded[i]:
      return decode.decode(self.encoded[i], "")
    return self.source[self.records[i]].image

  def crops(self, i: int, image: np.ndarray) -> list[np.ndarray]:
    """Returns the cropped and resized views of an image, before the colour augmentations.

    Some transforms make no views. Such a transform is applied completely, and its output arrays
    are returned, except scalars.

    Args:
      i: index of the image in `records`.
      image: decoded pixels of the image, uint8[height, width, 3].
    """
    if isinstance(self.transform, Views):
      size, antialias = self.transform.size, self.transform.antialias
      return [
        resizing.crop_and_resize(image, drawn.crop, size, antialias) for drawn in self.draws[i]
      ]
    rows = empty_rows(self.transform.arrays)
    label = int(self.source.labels[self.records[i]])
    random = Random(Stream(self.seed), self.records[i], 0)
    self.transform(Example(image, label, ""), random, rows)
    return [array for array in jax.tree.leaves(rows) if array.ndim]

  def colours(self, i: int, crops: list[np.ndarray]) -> list[np.ndarray]:
    """Augments the colours of an image's views and returns the views.

    If `on_host` is False, the views are returned unchanged.

    Args:
      i: index of the image in `records`.
      crops: cropped and resized views of the image.
    """
    if not self.on_host:
      return crops
    return [
      apply_host(crop, drawn, self.transform.brightness_rule)
      for crop, drawn in zip(crops, self.draws[i], strict=True)
    ]


def _stages(cfg: ConfigDict, work: Work, seconds: float) -> tuple[Stage, ...]:
  """Loads images in one thread, and returns the mean time of each stage, such as decoding.

  Args:
    cfg: config with all fields.
    work: images to measure.
    seconds: duration of the whole measurement in seconds, for all stages together.
  """
  count = len(work.records)
  batch_size = min(count, loader.PART_ROWS)
  first = work.crops(0, work.image(0))
  views = [np.empty((batch_size, *crop.shape), crop.dtype) for crop in first]
  mesh = sharding.make_mesh(1)
  spent: dict[str, list[float]] = {}
  done = 0

  def timed(name: str, function: Callable, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    spent.setdefault(name, []).append(time.perf_counter() - began)
    return result

  def write(row: int, images: list[np.ndarray]) -> None:
    for view, image in zip(views, images, strict=True):
      view[row] = image

  deadline = time.perf_counter() + seconds
  for i in itertools.cycle(range(count)):
    if isinstance(work.source, EncodedSource):
      timed("read", work.source.encoded, work.records[i])
    image = timed("decode", work.image, i)
    crops = timed("crop, resize", work.crops, i, image)
    if work.on_host:
      crops = timed("colour", work.colours, i, crops)
    timed("batch", write, done % batch_size, crops)
    done += 1
    if done % batch_size == 0 or (done == count and count < batch_size):
      timed("transfer", lambda: jax.block_until_ready(sharding.put_batch({"x": views}, mesh)))
      if time.perf_counter() > deadline:
        break
  return tuple(Stage(name, 1e3 * sum(times) / done) for name, times in spent.items())


def _run_bare(work: Work, seconds: float) -> float:
  """Decodes, crops, resizes and colours images in a loop, without the image loader.

  Returns the number of images per second.

  Args:
    work: images to measure.
    seconds: duration of the measurement in seconds.
  """
  began = time.perf_counter()
  for done in itertools.count(1):
    i = done % len(work.records)
    work.colours(i, work.crops(i, work.image(i)))
    if (now := time.perf_counter()) - began > seconds:
      break
  return done / (now - began)


def _run_pipeline(cfg: ConfigDict, source: Source, workers: int, seconds: float) -> float:
  """Runs the image loader and returns its images per second. The time of its start is not counted.

  Args:
    cfg: config with all fields.
    source: training images.
    workers: number of worker processes; 0 means that this process loads the images.
    seconds: duration of the measurement in seconds.
  """
  batch_size = min(cfg.train.batch_size, loader.PART_ROWS, len(source))
  batches = loader.train_batches(
    source,
    trainer.build_input(cfg, len(source.classes)),
    batch_size,
    cfg.seed,
    workers=workers,
    threads=cfg.data.threads,
    max_failed_share=1.0,
    prefetch=cfg.data.prefetch,
  )
  with batches:
    # The start of the workers and the prefetched batches are not counted.
    for _ in range(cfg.data.prefetch + 2 * max(workers, 1)):
      next(batches)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
      next(batches)
      done += batch_size
    return done / (time.perf_counter() - began)


def _run_side_by_side(work: Work, processes: int, seconds: float) -> float:
  """Decodes, crops, resizes and colours images in several processes at once, without the loader.

  Returns the number of images per second of all processes together.
  """
  context = multiprocessing.get_context("spawn")
  ready = context.Barrier(processes)
  with context.Pool(processes, _start_bare, (work, ready)) as pool:
    return sum(pool.map(_bare_in_process, [seconds] * processes, chunksize=1))


_bare: tuple = ()


def _start_bare(work: Work, ready) -> None:
  """Prepares a worker process: stores the images to measure and the barrier `ready`.

  All worker processes wait at the barrier, so that they start to measure at the same time.
  """
  global _bare
  _bare = (work, ready)
  batching.start_worker()


def _bare_in_process(seconds: float) -> float:
  """Measures in a worker process how many images per second it decodes, crops, resizes and colours.

  The measurement starts when all worker processes are ready.
  """
  work, ready = _bare
  ready.wait()
  return _run_bare(work, seconds)


def _rate(workers: int, images_per_second: float, limit: float, shared: float) -> Rate:
  """Compares the image loader's speed with that of the bare functions (decode, crop and resize).

  Args:
    workers: number of worker processes of the loader.
    images_per_second: images per second of the loader.
    limit: images per second of the bare functions in one process, without the loader.
    shared: images per second of the bare functions in as many processes as the loader uses.
  """
  per_core = images_per_second / max(1, min(workers, usable_cores()))
  return Rate(workers, images_per_second, per_core, per_core / limit, images_per_second / shared)


def _place(workers: int) -> str:
  """Returns where images are loaded, as text: "in this process", "1 worker" or "4 workers"."""
  return f"{workers} worker{'s' if workers > 1 else ''}" if workers else "in this process"
