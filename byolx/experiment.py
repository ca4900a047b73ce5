"""From a config to everything that runs: a recipe and its images. In these two rooms, and nowhere else,
a name in a config becomes an object."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from byolx import compilations, distributed, programs, recipe, sharding, train
from byolx.config import ConfigError
from byolx.data import augment, cifar, folders, pipeline, records, sources, splits, tfds
from byolx.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Experiment(Recipe):
  """What a config describes, built and checked: a recipe, and the images it is for.

  Args:
    train_source, test_source: images.
    views: the distributions T and T'.
    named: unreadable files that were named so far.
    kept: its programs.
  """

  train_source: sources.Source
  test_source: sources.Source
  views: tuple[augment.ViewSpec, augment.ViewSpec]
  named: set[str] = dataclasses.field(default_factory=set)
  kept: programs.Kept = dataclasses.field(default_factory=programs.none)

  def initialise(self) -> train.TrainState:
    """The state at step 0, made where it lives, by a program that is kept."""
    return self._initialiser(self.encoder_key)

  @functools.cached_property
  def _initialiser(self) -> jax.stages.Compiled:
    arguments, state = (self.abstract_key,), self.abstract_state
    if found := self.kept.find("initialise", arguments, state):
      return found
    made = train.initialiser(self.task, self.tx, self.layout, state).lower(*arguments)
    return self.kept.compile("initialise", made, arguments, state)

  def compile_step(self) -> jax.stages.Compiled:
    """The train step, from where it is kept, or compiled now."""
    arguments, state = self.step_arguments(), self.abstract_state
    if found := self.kept.find("step", arguments, state):
      print("the step was compiled in an earlier start, and is loaded", flush=True)
      return found
    return compilations.compile_aloud(
      self.lower(),
      self.mesh.devices.flat[0].platform,
      lambda lowered: self.kept.compile("step", lowered, arguments, state),
    )

  def train_batches(self, start_step: int) -> pipeline.Batches:
    """Training batches from a step on, see `pipeline.train_batches`."""
    c = self.config
    return pipeline.train_batches(
      self.train_source,
      self.views,
      c.views.size,
      c.train.batch_size,
      c.seed,
      start_step=start_step,
      placement=c.views.placement,
      antialias=c.views.antialias,
      workers=c.data.workers,
      threads=c.data.threads,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      max_failed_share=c.data.max_failed_share,
      named=self.named,
      prefetch=c.data.prefetch,
    )

  def evaluation_batches(self, source: sources.Source) -> pipeline.Batches:
    """Every image of a source in order, whole and centred, the last batch masked; this process's rows."""
    c = self.config
    return pipeline.evaluation_batches(
      source,
      c.views.size,
      c.eval.resize,
      c.eval.crop_rule,
      c.eval.batch_size,
      workers=c.data.workers,
      threads=c.data.threads,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      max_failed_share=c.data.max_failed_share,
      named=self.named,
      prefetch=c.data.prefetch,
    )


def build(config: ConfigDict, soon: Sequence[str] = ()) -> Experiment:
  """Builds and checks everything that a config says.

  Args:
    config: all fields.
    soon: programs that will be needed; where they are kept, they begin to load.

  Raises:
    ConfigError: fields that do not go together, or images that are not there.
  """
  train_source, test_source = build_sources(config)
  of_pass = config.train.micro_batch or config.train.batch_size
  sharding.split_cpu(of_pass // distributed.count(), config.mesh.cpu_devices)
  of_source = len(train_source), len(train_source.classes)
  devices = recipe.build_layout(config, jax.devices()).mesh.devices.ravel().tolist()
  kept = programs.of(config, devices, *of_source)
  for name in soon:
    kept.begin(name)
  made = recipe.build(config, jax.devices(), *of_source)
  _check_evaluation(config)
  return Experiment(
    **vars(made),
    train_source=train_source,
    test_source=test_source,
    views=build_views(config),
    kept=kept,
  )


def build_sources(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
  """Training and test images; with data.validation, both are training images of the source.

  Raises:
    ConfigError: they are not there, or not enough of them.
  """
  data = config.data
  makers = {
    "digits": functools.partial(sources.digits, test_share=data.test_share),
    "fashion_mnist": functools.partial(sources.fashion_mnist, data.folder),
    "image_folder": functools.partial(
      folders.image_folder, data.folder, test_share=data.test_share
    ),
    "imagenet": functools.partial(folders.imagenet, data.folder),
    "places365": functools.partial(folders.places365, data.folder),
    "cifar10": functools.partial(cifar.cifar10, data.folder),
    "cifar100": functools.partial(cifar.cifar100, data.folder),
    "array_record": functools.partial(records.prepared, data.folder, test_share=data.test_share),
    "tfds": functools.partial(tfds.tfds, data.folder),
  }
  make = makers[data.source]
  try:
    train = make(split="train")
    if data.validation == "none":
      return train, make(split="test")
  except ValueError as error:
    raise ConfigError(str(error)) from None
  try:
    parts = splits.imagenet_validation(train.names, data.validation)
  except ValueError as error:
    raise ConfigError(
      f"data.validation={data.validation}: {error}; it is meant for ImageNet (data.source=imagenet,"
      " or ImageNet as array_record, tfds or image_folder) and works for any source that large"
    ) from None
  return sources.subset(train, parts[0]), sources.subset(train, parts[1])


def build_views(config: ConfigDict) -> tuple[augment.ViewSpec, augment.ViewSpec]:
  """The distributions T and T' (Table 6)."""
  rules = {
    "crop_rule": config.views.crop_rule,
    "brightness_rule": config.views.brightness_rule,
  }
  first, second = config.views.view1, config.views.view2
  return augment.ViewSpec(**first, **rules), augment.ViewSpec(**second, **rules)


def _check_evaluation(config: ConfigDict) -> None:
  if config.eval.batch_size % jax.process_count():
    raise ConfigError(
      f"eval.batch_size={config.eval.batch_size}: expected a multiple of the {jax.process_count()} "
      "processes"
    )
  if config.eval.resize < config.views.size:
    raise ConfigError(
      f"eval.resize={config.eval.resize}: the centre crop of views.size={config.views.size} is "
      "larger than the image; expected eval.resize of at least views.size"
    )
