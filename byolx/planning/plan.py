"""`byolx plan`: estimates memory, speed, duration and price of training a config on a TPU slice.

A slice is a group of TPU chips that train together. The TPU compiler compiles the train step of
`byolx train`. It needs neither a TPU nor images. If the step needs too much memory, changed configs
that need less memory are compiled too. The change with the smallest drawback is tried first.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.data import splits
from byolx.data.sources import small
from byolx.models.remat import KEPT
from byolx.planning import ahead_of_time, tpu
from byolx.runs import trainer
from byolx.runs.images import build_sources

SOURCE_SIZES = {
  "imagenet": (1_281_167, 1000),
  "places365": (1_803_460, 365),
  "cifar10": (50_000, 10),
  "cifar100": (50_000, 100),
  "fashion_mnist": (60_000, 10),
}
"""Number of training images and number of classes of each public data set, by `data.source`."""

HELD_OUT = {"none": 0, "last_10009": 10_009, "first_10000": 10_000}
"""Number of training images that are set aside for validation, by `data.validation`."""

STATES = sharding.STATES
REMATS = tuple(KEPT)
"""Values of the config fields `mesh.state` and `train.remat`, from the most memory of a train step to
the least."""


@dataclasses.dataclass(frozen=True)
class Terms:
  """The user's assumptions and options for a plan, such as the price of a core-hour.

  Args:
    efficiency: expected speed of the run, divided by the speed that the compiler estimates, above
      0 and at most 1. Input, network and checkpoints make a run slower than this estimate. The
      paper's run reached 0.59 (docs/plan.md: 54.1 / 92 ms).
    price: price of a core-hour in USD; None if the plan has no price. A core is one jax device.
    images, classes: number of training images and number of classes. If a number is None, it is
      found from the config's data set.
    search: whether to search for a changed config if a step needs too much memory.
    cache: folder of the compiler's cached estimates; None disables the cache.
  """

  efficiency: float = 0.5
  price: float | None = None
  images: int | None = None
  classes: int | None = None
  search: bool = True
  cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """Estimates for training one config on one TPU slice: memory, speed, duration and price.

  Args:
    config: name of the config.
    changes: values of the config fields that were changed to reduce the memory, by name; empty for
      the user's own config.
    topology: TPU slice, such as v3:16x16.
    terms: the user's assumptions, such as the price of a core-hour.
    batch_size: number of images in a train step.
    passes: number of micro-batches (parts of a batch) that a train step processes one after another.
    used: number of cores that the train step runs on.
    steps: number of train steps of the whole training.
    figures: the compiler's estimates for one train step on one core.
    better: plan of the first changed config that fits the memory. It is None if this plan fits, if
      no changed config fits, or if none was tried.
    tried: one line for each change of the config that was tried, with the result.
  """

  config: str
  changes: dict[str, Any]
  topology: tpu.Topology
  terms: Terms
  batch_size: int
  passes: int
  used: int
  steps: int
  figures: ahead_of_time.Figures
  better: "Plan | None" = None
  tried: tuple[str, ...] = ()

  @property
  def flags(self) -> list[str]:
    """Changes of the config as arguments of `byolx train`, such as `--config.train.remat=block`."""
    return [f"--config.{name}={value}" for name, value in self.changes.items()]

  @property
  def scheduled_seconds(self) -> float | None:
    """Seconds of a train step, as estimated by the compiler.

    It is None if the compiler refused the step as too large for the memory.
    """
    cycles = self.figures.cycles
    return None if cycles is None else cycles / self.topology.generation.clock_hz

  @property
  def images_per_second(self) -> float | None:
    """Images per second on which the slice trains at the speed that the compiler estimates.

    The image loaders must deliver as many images. The value is None if the compiler refused the
    train step as too large for the memory.
    """
    seconds = self.scheduled_seconds
    return self.batch_size / seconds if seconds else None

  @property
  def hours(self) -> float | None:
    """Hours of the whole training at the speed that the compiler estimates.

    This is an optimistic estimate. It is None if the compiler refused the train step as too large
    for the memory.
    """
    seconds = self.scheduled_seconds
    return None if seconds is None else self.steps * seconds / 3600

  @property
  def core_hours(self) -> float | None:
    """Expected hours of the whole training, multiplied by the number of cores of the slice.

    The expected speed is `Terms.efficiency` times the speed that the compiler estimates. The value
    is None if the compiler refused the train step as too large for the memory.
    """
    return self.hours and self.hours / self.terms.efficiency * self.topology.cores

  @property
  def usd(self) -> float | None:
    """Price of the whole training in USD.

    It is None if `Terms.price` is None. It is also None if the compiler refused the train step as
    too large for the memory.
    """
    price = self.terms.price
    return None if price is None or self.core_hours is None else price * self.core_hours

  @property
  def share_of_flops(self) -> float | None:
    """Estimated arithmetic rate of a train step, divided by the TPU's peak rate.

    The value is from 0 to 1. It is None if the compiler refused the step as too large for the memory.
    """
    return self._share(self.figures.flops, self.topology.generation.flops)

  @property
  def share_of_bandwidth(self) -> float | None:
    """Estimated memory traffic of a train step per second, divided by the memory's peak rate.

    The value is from 0 to 1. It is None if the compiler refused the step as too large for the memory.
    """
    return self._share(self.figures.bytes_accessed, self.topology.generation.bandwidth)

  def _share(self, amount: float | None, peak: float) -> float | None:
    seconds = self.scheduled_seconds
    return amount / peak / seconds if amount is not None and seconds else None

  def json(self, costs: int = 0) -> dict[str, Any]:
    """Returns the plan as a dictionary for JSON. Its units are bytes, seconds, hours and USD.

    Args:
      costs: number of the costliest instructions to include.
    """
    figures, topology = self.figures, self.topology
    values = {
      "config": self.config,
      "changes": self.changes,
      "topology": topology.name,
      "cores": topology.cores,
      "hosts": topology.hosts,
      "fits": figures.fits,
      "memory_bytes": topology.generation.memory_bytes,
      "peak_bytes": figures.peak_bytes,
      "argument_bytes": figures.argument_bytes,
      "output_bytes": figures.output_bytes,
      "temp_bytes": figures.temp_bytes,
      "flops": figures.flops,
      "bytes_accessed": figures.bytes_accessed,
      "scheduled_step_seconds": self.scheduled_seconds,
      "roofline_step_seconds": figures.roofline_seconds,
      "share_of_flops": self.share_of_flops,
      "share_of_bandwidth": self.share_of_bandwidth,
      "collectives": figures.collectives,
      "cycles_by_kind": figures.kinds,
      "unestimated": figures.unestimated,
      "unknown_loops": figures.unknown_loops,
      "compile_seconds": figures.compile_seconds,
      "batch_size": self.batch_size,
      "passes": self.passes,
      "steps": self.steps,
      "images_per_second": self.images_per_second,
      "images_per_second_per_host": self.images_per_second
      and self.images_per_second / topology.hosts,
      "hours": self.hours,
      "efficiency": self.terms.efficiency,
      "hours_at_efficiency": self.hours and self.hours / self.terms.efficiency,
      "core_hours": self.core_hours,
      "usd": self.usd,
      "jax": figures.jax,
      "libtpu": figures.libtpu,
      "tried": list(self.tried),
      "smallest_change": self.better.json(costs) if self.better else None,
    }
    if costs:
      values["costs"] = [dataclasses.asdict(cost) for cost in figures.costs[:costs]]
    return values


def build(config: ConfigDict, topology: tpu.Topology, terms: Terms) -> trainer.Recipe:
  """Builds and checks the train step of a config for a TPU slice, without compiling it.

  Args:
    config: config with all fields.
    topology: TPU slice, such as v3:16x16.
    terms: the user's assumptions. Only the numbers of images and classes are used.

  Raises:
    ConfigError: the config cannot run on the slice, its images cannot be counted, or libtpu is not
      installed.
  """
  try:
    return trainer.build(config, tpu.devices(topology), *count_images(config, terms))
  except ConfigError as error:
    flag = f"--topology={topology.name}"
    raise ConfigError(str(error) if flag in str(error) else f"{flag}: {error}") from None


def make(recipe: trainer.Recipe, name: str, topology: tpu.Topology, terms: Terms) -> Plan:
  """Compiles a train step for a TPU slice and returns its plan: memory, speed and price.

  If the step needs too much memory, changed configs that need less are compiled too. The first one
  that fits becomes `Plan.better` of the result. `terms.search=False` disables this search.

  Args:
    recipe: train step that `build` has built for the slice, with its config.
    name: name of the config to show in the output.
    topology: TPU slice, such as v3:16x16.
    terms: the user's assumptions, such as the price of a core-hour.

  Raises:
    ConfigError: the compiler refuses the step, but not because of its size.
  """

  def plan_of(recipe: trainer.Recipe, changes: dict[str, Any]) -> Plan:
    figures = ahead_of_time.figures(recipe.lower(), topology, terms.cache)
    batch_size, cores, passes = recipe.config.train.batch_size, recipe.mesh.size, recipe.passes
    return Plan(name, changes, topology, terms, batch_size, passes, cores, recipe.steps, figures)

  unchanged = plan_of(recipe, {})
  if unchanged.figures.fits or not terms.search:
    return unchanged
  tried: list[str] = []
  config = recipe.config
  estimate = _Estimate(recipe, unchanged.figures.peak_bytes, topology.generation.memory_bytes)
  for changes in candidates(config, recipe.mesh.size):
    label = ", ".join(f"{field}={value}" for field, value in changes.items())
    if not estimate.may_fit(changes):
      tried.append(f"{label}: cannot free enough, not compiled")
      continue
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    try:
      candidate = build(changed, topology, terms)
    except ConfigError as error:
      tried.append(f"{label}: {error}")
      continue
    plan = plan_of(candidate, changes)
    estimate.add(changes, plan.figures.peak_bytes)
    tried.append(f"{label}: needs {plan.figures.peak_bytes / 2**30:.2f} GiB")
    if plan.figures.fits:
      return dataclasses.replace(unchanged, better=plan, tried=tuple(tried))
  return dataclasses.replace(unchanged, tried=tuple(tried))


def count_images(config: ConfigDict, terms: Terms) -> tuple[int, int]:
  """Returns the number of training images and the number of classes of a config.

  A number in `terms` is returned unchanged. Otherwise, the numbers of public data sets are known. For
  other data sets, the images are opened and counted.

  Args:
    config: config with all fields.
    terms: the user's assumptions.

  Raises:
    ConfigError: the images have to be counted and cannot be read.
  """
  data = config.data
  images, classes = terms.images, terms.classes
  if images is None or classes is None:
    if data.source in SOURCE_SIZES:
      source_images, source_classes = SOURCE_SIZES[data.source]
      counts = (_selected(data, source_images), source_classes)
    elif data.source == "digits":
      train = small.digits("train", test_share=data.test_share)
      counts = (_selected(data, len(train)), len(train.classes))
    else:
      counts = _count_in_source(config)
    images = counts[0] if images is None else images
    classes = counts[1] if classes is None else classes
  return images, classes


def _selected(data: ConfigDict, images: int) -> int:
  """Returns the number of images on which a config trains.

  Validation images do not count. If the config selects a part of the labelled images, only these
  images count.

  Args:
    data: config group `data`.
    images: number of all training images of the data set.
  """
  if data.label_list:
    return len(set(splits.read_list(data.label_list)))
  held_out = HELD_OUT.get(data.validation, math.ceil(data.validation_share * images))
  return min(images - held_out, round(data.labels * images))


def _count_in_source(config: ConfigDict) -> tuple[int, int]:
  try:
    train = build_sources(config).train
  except (ConfigError, OSError) as error:
    raise ConfigError(
      f"data.source={config.data.source}: its images cannot be counted ({error}); give --images=N "
      "and --classes=N"
    ) from None
  return len(train), len(train.classes)


def candidates(config: ConfigDict, cores: int) -> Iterator[dict[str, Any]]:
  """Yields changes of a config that reduce the memory of a train step.

  Each change is a dictionary from field names to new values. Sharding the training state over the
  cores and recomputing activations come first, because they do not change the results. Smaller
  micro-batches come last, because BatchNorm then normalises over fewer images.

  Args:
    config: config whose train step needs too much memory.
    cores: number of cores that the step runs on.
  """
  remats = [{}, *({"train.remat": name} for name in _after(REMATS, config.train.remat))]
  states = [{}, *({"mesh.state": name} for name in _after(STATES, config.mesh.state))]
  size = config.train.micro_batch or config.train.batch_size
  micro_batches = [{}]
  while size % 2 == 0 and size // 2 >= cores:
    size //= 2
    micro_batches.append({"train.micro_batch": size})
  for micro_batch in micro_batches:
    for remat in remats:
      for state in states:
        if changes := {**micro_batch, **remat, **state}:
          yield changes


def _after(names: tuple[str, ...], name: str) -> tuple[str, ...]:
  """Returns the elements of `names` after `name`."""
  return names[names.index(name) + 1 :]


class _Estimate:
  """Estimates how much memory a change of the config saves.

  A change that cannot save enough is not compiled. The estimate is optimistic: the real saving
  should not be larger.

  Args:
    recipe: train step that needs too much memory.
    peak: peak memory of that step on a core in bytes.
    memory: memory of a core in bytes.
  """

  def __init__(self, recipe: trainer.Recipe, peak: int, memory: int):
    state = recipe.abstract_state
    self._memory = memory
    self._peaks = {frozenset(): peak}
    self._passes = recipe.passes
    self._batch = recipe.config.train.batch_size
    # Gradients, their update and a copy of the parameters are each as large as the parameters.
    self._state = sharding.held_bytes(state) + 3 * sharding.held_bytes(state.params)
    self._activations = max(0, peak - sharding.held_bytes(state))

  def add(self, changes: dict[str, Any], peak: int) -> None:
    """Stores the memory of a changed train step after its compilation.

    Later estimates become more exact with it.

    Args:
      changes: new values of the changed fields, by name.
      peak: peak memory of the changed step on a core in bytes.
    """
    self._peaks[frozenset(changes.items())] = peak

  def may_fit(self, changes: dict[str, Any]) -> bool:
    """Returns whether a changed train step fits the memory of a core by an optimistic estimate.

    If the result is False, compiling the step is not worth the time.

    Args:
      changes: new values of the changed config fields, by name.
    """
    others = {name: value for name, value in changes.items() if name != "mesh.state"}
    freed = float(self._state) if "mesh.state" in changes else 0.0
    peak = self._peaks.get(frozenset(others.items()))
    if peak is not None:
      return peak - freed <= self._memory
    if "train.remat" in changes:
      freed += self._activations
    elif "train.micro_batch" in changes:
      passes = self._batch / changes["train.micro_batch"]
      freed += self._activations * (1 - self._passes / passes)
    return self._peaks[frozenset()] - freed <= self._memory
