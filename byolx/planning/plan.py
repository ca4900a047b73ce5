"""`byolx plan`: will a config's step fit a TPU slice, how fast, for how long, at what price.

The very step that `byolx train` runs is compiled for the slice by the TPU compiler, without a TPU and
without images. When it does not fit, changes are tried, from what costs least to what costs most.
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
from byolx.planning import ahead_of_time, tpu
from byolx.runs import trainer
from byolx.runs.images import build_sources

KNOWN = {
  "imagenet": (1_281_167, 1000),
  "places365": (1_803_460, 365),
  "cifar10": (50_000, 10),
  "cifar100": (50_000, 100),
  "fashion_mnist": (60_000, 10),
}
"""Training images and classes of the sources that are the same for everybody."""

HELD_OUT = {"none": 0, "last_10009": 10_009, "first_10000": 10_000}

STATES = ("replicated", "zero", "full")
REMATS = ("none", "convolution", "block", "stage")


@dataclasses.dataclass(frozen=True)
class Terms:
  """What a plan is made under.

  Args:
    efficiency: share of the scheduled speed that a run is expected to reach, input, network and
      checkpoints included. The paper's own run reached 0.59 of what this compiler schedules for its
      program.
    price: USD per core and hour; a core is a device as jax sees it.
    images, classes: of the training set, where the source's name does not say.
    search: for a change with which a step fits that does not.
    cache: folder of what the compiler said before.
  """

  efficiency: float = 0.5
  price: float | None = None
  images: int | None = None
  classes: int | None = None
  search: bool = True
  cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """One config on one slice.

  Args:
    config: as it was named.
    changes: fields set beyond it to make it fit.
    topology: the slice.
    terms: see there.
    batch_size: images of a step.
    passes: forward passes of a step.
    used: cores that it runs on.
    steps: of the whole schedule.
    figures: what the compiler says.
    better: the same with the smallest change that fits, where this does not and one was found.
    tried: what was tried to make it fit, in order, and what came of it.
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
    """The changes as arguments of a command."""
    return [f"--config.{name}={value}" for name, value in self.changes.items()]

  @property
  def scheduled_seconds(self) -> float | None:
    """Of a step, one instruction after the other."""
    cycles = self.figures.cycles
    return None if cycles is None else cycles / self.topology.generation.clock_hz

  @property
  def images_per_second(self) -> float | None:
    """Of the whole slice, at the scheduled estimate: what the input must deliver."""
    seconds = self.scheduled_seconds
    return self.batch_size / seconds if seconds else None

  @property
  def hours(self) -> float | None:
    """Of all steps at the scheduled estimate; at the terms' efficiency they take longer."""
    seconds = self.scheduled_seconds
    return None if seconds is None else self.steps * seconds / 3600

  @property
  def core_hours(self) -> float | None:
    """At the terms' efficiency."""
    return self.hours and self.hours / self.terms.efficiency * self.topology.cores

  @property
  def usd(self) -> float | None:
    """At the terms' efficiency and price."""
    price = self.terms.price
    return None if price is None or self.core_hours is None else price * self.core_hours

  @property
  def share_of_flops(self) -> float | None:
    """Of the matrix units' peak, at the scheduled estimate."""
    return self._share(self.figures.flops, self.topology.generation.flops)

  @property
  def share_of_bandwidth(self) -> float | None:
    """Of the memory's peak, at the scheduled estimate."""
    return self._share(self.figures.bytes_accessed, self.topology.generation.bandwidth)

  def _share(self, amount: float | None, peak: float) -> float | None:
    seconds = self.scheduled_seconds
    return amount / peak / seconds if amount is not None and seconds else None

  def json(self, costs: int = 0) -> dict[str, Any]:
    """Every figure, in bytes, seconds, hours and USD, with the costliest instructions if wanted."""
    figures, topology = self.figures, self.topology
    found = {
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
      found["costs"] = [dataclasses.asdict(cost) for cost in figures.costs[:costs]]
    return found


def build(config: ConfigDict, topology: tpu.Topology, terms: Terms) -> trainer.Recipe:
  """What is to be compiled: quick, so that mistakes are known before anything is.

  Raises:
    ConfigError: the config cannot run on the slice; its images cannot be counted; no compiler.
  """
  try:
    return trainer.build(config, tpu.devices(topology), *count_images(config, terms))
  except ConfigError as error:
    given = f"--topology={topology.name}"
    raise ConfigError(str(error) if given in str(error) else f"{given}: {error}") from None


def make(built: trainer.Recipe, name: str, topology: tpu.Topology, terms: Terms) -> Plan:
  """Compiles a step for a slice, and if it does not fit looks for a change that does.

  Args:
    built: by `build`.
    name: of the config, for the page.
    topology: slice.
    terms: see there.

  Raises:
    ConfigError: the compiler refuses the step for another reason than its size.
  """

  def of(one: trainer.Recipe, changes: dict[str, Any]) -> Plan:
    found = ahead_of_time.figures(one.lower(), topology, terms.cache)
    batch_size, cores = one.config.train.batch_size, one.mesh.size
    return Plan(name, changes, topology, terms, batch_size, one.passes, cores, one.steps, found)

  asked = of(built, {})
  if asked.figures.fits or not terms.search:
    return asked
  tried: list[str] = []
  config = built.config
  need = _Need(built, asked.figures.peak_bytes, topology.generation.memory_bytes)
  for changes in candidates(config, built.mesh.size):
    words = ", ".join(f"{field}={value}" for field, value in changes.items())
    if not need.may_fit(changes):
      tried.append(f"{words}: cannot free enough, not compiled")
      continue
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    try:
      one = build(changed, topology, terms)
    except ConfigError as error:
      tried.append(f"{words}: {error}")
      continue
    found = of(one, changes)
    need.note(changes, found.figures.peak_bytes)
    tried.append(f"{words}: needs {found.figures.peak_bytes / 2**30:.2f} GiB")
    if found.figures.fits:
      return dataclasses.replace(asked, better=found, tried=tuple(tried))
  return dataclasses.replace(asked, tried=tuple(tried))


def count_images(config: ConfigDict, terms: Terms) -> tuple[int, int]:
  """Training images and classes: as given, as the source's name says, else by looking.

  Raises:
    ConfigError: nothing says, and they are not there.
  """
  data = config.data
  images, classes = terms.images, terms.classes
  if images is None or classes is None:
    if data.source in KNOWN:
      whole, known_classes = KNOWN[data.source]
      known = (_used(data, whole), known_classes)
    elif data.source == "digits":
      train = small.digits("train", test_share=data.test_share)
      known = (_used(data, len(train)), len(train.classes))
    else:
      known = _look(config)
    images = known[0] if images is None else images
    classes = known[1] if classes is None else classes
  return images, classes


def _used(data: ConfigDict, images: int) -> int:
  """How many of a source's training images are trained on, by the fields of `data`."""
  if data.label_list:
    return len(set(splits.read_list(data.label_list)))
  held = HELD_OUT.get(data.validation, math.ceil(data.validation_share * images))
  return min(images - held, round(data.labels * images))


def _look(config: ConfigDict) -> tuple[int, int]:
  try:
    train = build_sources(config).train
  except (ConfigError, OSError) as error:
    raise ConfigError(
      f"data.source={config.data.source}: its images cannot be counted ({error}); give --images=N "
      "and --classes=N"
    ) from None
  return len(train), len(train.classes)


def candidates(config: ConfigDict, cores: int) -> Iterator[dict[str, Any]]:
  """Changes that make a step smaller, the cheapest first.

  First what leaves results as they are: a state in pieces, then a backward pass that computes more
  again. Last micro-batches, which change what normalisation sees.

  Args:
    config: that does not fit.
    cores: of the slice.
  """
  keep = [{}, *({"train.remat": name} for name in _after(REMATS, config.train.remat))]
  place = [{}, *({"mesh.state": name} for name in _after(STATES, config.mesh.state))]
  whole = config.train.micro_batch or config.train.batch_size
  parts = [{}]
  while whole % 2 == 0 and whole // 2 >= cores:
    whole //= 2
    parts.append({"train.micro_batch": whole})
  for part in parts:
    for kept in keep:
      for placed in place:
        if changes := {**part, **kept, **placed}:
          yield changes


def _after(names: tuple[str, ...], name: str) -> tuple[str, ...]:
  return names[names.index(name) + 1 :]


class _Need:
  """Which changes may free enough memory, seen generously: the others need not be compiled.

  Args:
    built: that does not fit.
    peak: bytes that it needs on a core.
    memory: bytes that there are.
  """

  def __init__(self, built: trainer.Recipe, peak: int, memory: int):
    state = built.abstract_state
    self._memory = memory
    self._peaks = {frozenset(): peak}
    self._passes = built.passes
    self._batch = built.config.train.batch_size
    # Gradients and their update are as large as the parameters, and so is a copy of these.
    self._state = sharding.held_bytes(state) + 3 * sharding.held_bytes(state.params)
    self._activations = max(0, peak - sharding.held_bytes(state))

  def note(self, changes: dict[str, Any], peak: int) -> None:
    """Remembers what a step with these changes needs."""
    self._peaks[frozenset(changes.items())] = peak

  def may_fit(self, changes: dict[str, Any]) -> bool:
    """Whether all that the changes could free is as much as is missing."""
    others = {name: value for name, value in changes.items() if name != "mesh.state"}
    freed = float(self._state) if "mesh.state" in changes else 0.0
    known = self._peaks.get(frozenset(others.items()))
    if known is not None:
      return known - freed <= self._memory
    if "train.remat" in changes:
      freed += self._activations
    elif "train.micro_batch" in changes:
      passes = self._batch / changes["train.micro_batch"]
      freed += self._activations * (1 - self._passes / passes)
    return self._peaks[frozenset()] - freed <= self._memory
