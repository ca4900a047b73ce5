"""From a config to everything that runs: a recipe and its images. In these two rooms, and nowhere else,
a name in a config becomes an object."""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict

from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.data import loader
from byolx.data.augment import distribution, randaugment
from byolx.data.sources import base
from byolx.runs import trainer
from byolx.runs.images import Sources, build_sources
from byolx.runs.trainer import Recipe
from byolx.training import compile_cache, programs
from byolx.training.state import TrainState, initialiser


@dataclasses.dataclass(frozen=True)
class Experiment(Recipe):
  """What a config describes, built and checked: a recipe, and the images it is for.

  Args:
    sources: images.
    views: the distribution of each view.
    named: unreadable files that were named so far.
    kept: its programs.
  """

  sources: "Sources"
  views: tuple[distribution.ViewSpec, ...]
  named: set[str] = dataclasses.field(default_factory=set)
  kept: programs.Kept = dataclasses.field(default_factory=programs.none)

  def initialise(self) -> TrainState:
    """The state at step 0, made where it lives, by a program that is kept."""
    return self._initialiser(self.encoder_key)

  @functools.cached_property
  def _initialiser(self) -> jax.stages.Compiled:
    arguments, state = (self.abstract_key,), self.abstract_state
    if found := self.kept.find("initialise", arguments, state, self._counts):
      return found
    made = initialiser(self.task, self.tx, self.layout, state).lower(*arguments)
    return self.kept.compile("initialise", made, arguments, state, self._counts)

  def compile_step(self) -> jax.stages.Compiled:
    """The train step, from where it is kept, or compiled now."""
    arguments, state = self.step_arguments(), self.abstract_state
    if found := self.kept.find("step", arguments, state, self._counts):
      print("the step was compiled in an earlier start, and is loaded", flush=True)
      return found
    return compile_cache.compile_aloud(
      self.lower(),
      self.mesh.devices.flat[0].platform,
      lambda lowered: self.kept.compile("step", lowered, arguments, state, self._counts),
    )

  @property
  def _counts(self) -> dict[str, int]:
    """What programs depend on besides the config: how many images and classes there are."""
    return {"images": len(self.train_source), "classes": len(self.train_source.classes)}

  @property
  def train_source(self) -> base.Source:
    """What is trained on."""
    return self.sources.train

  def train_batches(self, start_step: int) -> loader.Batches:
    """Training batches from a step on, see `loader.train_batches`."""
    c = self.config
    return loader.train_batches(
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

  def evaluation_batches(self, source: base.Source) -> loader.Batches:
    """Every image of a source in order, whole and centred, the last batch masked; this process's rows."""
    c = self.config
    return loader.evaluation_batches(
      source,
      c.views.size,
      c.eval.resize,
      c.eval.crop_rule,
      c.eval.batch_size,
      antialias=c.eval.antialias,
      workers=c.data.workers,
      threads=c.data.threads,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      max_failed_share=c.data.max_failed_share,
      named=self.named,
      prefetch=c.data.prefetch,
    )


def build(config: ConfigDict, kept: programs.Kept | None = None) -> Experiment:
  """Builds and checks everything that a config says.

  Args:
    config: all fields.
    kept: its programs, where they were looked for before, see `compile_cache.begin`.

  Raises:
    ConfigError: fields that do not go together, or images that are not there.
  """
  _check_origin(config)
  images = build_sources(config)
  devices = sharding.find_devices(config)
  made = trainer.build(config, devices, len(images.train), len(images.train.classes))
  _check_evaluation(config)
  kept = kept or programs.of(config, made.mesh.devices.ravel().tolist())
  return Experiment(**vars(made), sources=images, views=build_views(config), kept=kept)


def build_views(config: ConfigDict) -> tuple[distribution.ViewSpec, ...]:
  """The distributions T and T' of pretraining (Table 6), or the one that a classifier is trained on.

  Raises:
    ConfigError: RandAugment's settings are impossible.
  """
  rules = {
    "crop_rule": config.views.crop_rule,
    "brightness_rule": config.views.brightness_rule,
  }
  first = distribution.ViewSpec(**config.views.view1, **rules)
  if config.task == "pretrain":
    return first, distribution.ViewSpec(**config.views.view2, **rules)
  if config.classify.views == "pretrain":
    return (first,)
  spatial = dataclasses.replace(
    first,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
    solarise_probability=0.0,
  )
  if config.classify.views == "spatial":
    return (spatial,)
  try:
    chosen = randaugment.RandAugment(**config.classify.randaugment)
  except ValueError as error:
    raise ConfigError(f"classify.randaugment: {error}") from None
  return (dataclasses.replace(spatial, randaugment=chosen),)


def _check_origin(config: ConfigDict) -> None:
  """Where the encoder comes from has to go with what is trained."""
  wanted, given = config.task in ("linear", "finetune"), config.init.workdir
  if wanted and not given:
    raise ConfigError(
      f"task={config.task} without init.workdir: expected the workdir or checkpoint whose encoder is "
      "evaluated (task=supervised starts from scratch)"
    )
  if config.task == "supervised" and given:
    raise ConfigError(
      f"task=supervised with init.workdir={given}: it starts from scratch; expected task=finetune, or "
      "init.like to take only fields from that run"
    )
  if config.init.inherit and not (config.init.like or given):
    raise ConfigError(
      f"init.inherit={tuple(config.init.inherit)} without init.like or init.workdir: expected the run "
      "whose fields are taken"
    )
  if config.task != "pretrain" and config.data.validation == "none" and not config.eval.test:
    raise ConfigError(
      "eval.test=False with data.validation=none: nothing would be measured; expected one of them"
    )


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
