"""Experiments: everything that a run needs for training, built from its config and its images."""

import dataclasses
import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.data import loader
from byolx.data.sources import base
from byolx.models.encoder import Network
from byolx.runs import schema, trainer
from byolx.runs.images import Sources, build_sources
from byolx.runs.trainer import Recipe
from byolx.tasks import TASKS
from byolx.training import compile_cache, programs
from byolx.training.state import TrainState, initialiser


@dataclasses.dataclass(frozen=True)
class Experiment(Recipe):
  """Everything that a run needs for training, built and checked.

  It adds the images to a `Recipe`, which has the networks, task, optimiser and devices of a config.

  Args:
    sources: images of the training, validation and test splits.
    named: reasons for unreadable images that were already logged, so that each is logged only once.
    kept: store on disk for compiled programs.
  """

  sources: Sources
  named: set[str] = dataclasses.field(default_factory=set)
  kept: programs.Kept = dataclasses.field(default_factory=programs.none)

  def initialise(self) -> TrainState:
    """Computes the state at step 0, on the devices that hold it.

    If the compiled program for this is stored on disk, it is loaded and not compiled again.
    """
    return self._initialiser(self.encoder_key)

  @functools.cached_property
  def _initialiser(self) -> jax.stages.Compiled:
    arguments, state = (self.abstract_key,), self.abstract_state
    if program := self.kept.find("initialise", arguments, state, self._counts):
      return program
    lowered = initialiser(self.task, self.tx, self.layout, state).lower(*arguments)
    return self.kept.compile("initialise", lowered, arguments, state, self._counts)

  def compile_step(self) -> jax.stages.Compiled:
    """Returns the compiled train step. If it is stored on disk, it is loaded and not compiled again."""
    arguments, state = self.step_arguments(), self.abstract_state
    if program := self.kept.find("step", arguments, state, self._counts):
      print("the step was compiled in an earlier start, and is loaded", flush=True)
      return program
    return compile_cache.compile_aloud(
      self.lower(),
      self.mesh.devices.flat[0].platform,
      lambda lowered: self.kept.compile("step", lowered, arguments, state, self._counts),
    )

  @property
  def _counts(self) -> dict[str, int]:
    """Numbers of training images and classes.

    Compiled programs depend on these numbers and on the config.
    """
    return {"images": len(self.train_source), "classes": len(self.train_source.classes)}

  @property
  def train_source(self) -> base.Source:
    """Training images of the run."""
    return self.sources.train

  def train_batches(self, start_step: int) -> loader.Batches:
    """Returns an iterator over training batches, which never ends.

    Args:
      start_step: number of the first batch, from 0. This is also the number of batches that were used
        before.
    """
    c = self.config
    transform = self.task.transform("train")
    return loader.train_batches(
      self.train_source, transform, c.train.batch_size, c.seed, start_step=start_step, **self._input
    )

  def evaluation_batches(self, source: base.Source) -> loader.Batches:
    """Returns an iterator over the evaluation batches of a source of images.

    Each image comes once. The last batch is padded to the size of the others.
    """
    transform, rows = self.task.transform("test"), self.config.eval.batch_size
    return loader.evaluation_batches(source, transform, rows, **self._input)

  @property
  def _input(self) -> dict[str, Any]:
    """Arguments of the loader that training and evaluation batches share."""
    data = self.config.data
    return {
      "workers": data.workers,
      "threads": data.threads,
      "host_index": jax.process_index(),
      "host_count": jax.process_count(),
      "max_failed_share": data.max_failed_share,
      "named": self.named,
      "prefetch": data.prefetch,
    }


def build(
  config: ConfigDict,
  kept: programs.Kept | None = None,
  images: Sources | None = None,
  network: Network | None = None,
) -> Experiment:
  """Builds and checks an experiment: everything that a run needs for training.

  Args:
    config: config of the run, with all fields.
    kept: store on disk for compiled programs, from `compile_cache.begin`. If it is None, this function
      opens the store. It is not used with the user's own encoder.
    images: the user's own images, instead of those of the config group `data`; None for the config's.
    network: the user's own encoder, a function from `nnx.Rngs` to a module; None for the config's
      ResNet.

  Raises:
    ConfigError: values of fields do not fit each other, or images are missing.
  """
  check(config)
  images = images or build_sources(config)
  devices = sharding.find_devices(config)
  recipe = trainer.build(config, devices, len(images.train), len(images.train.classes), network)
  _check_evaluation(config)
  if network is not None:
    kept = programs.none()  # the cache is looked up by config, which does not describe this network
  kept = kept or programs.of(
    config, recipe.mesh.devices.ravel().tolist(), schema.task_source(config)
  )
  return Experiment(**vars(recipe), sources=images, kept=kept)


def check(config: ConfigDict) -> None:
  """Checks that values of fields fit each other, before any image is read.

  Raises:
    ConfigError: values of fields do not fit each other.
  """
  TASKS[config.task].check(config)
  if config.init.inherit and not (config.init.like or config.init.workdir):
    raise ConfigError(
      f"init.inherit={tuple(config.init.inherit)} without init.like or init.workdir: expected the run "
      "whose fields are taken"
    )
  if config.eval.resize < config.views.size:
    raise ConfigError(
      f"eval.resize={config.eval.resize}: the centre crop of views.size={config.views.size} is "
      "larger than the image; expected eval.resize of at least views.size"
    )


def _check_evaluation(config: ConfigDict) -> None:
  """Checks that the processes can divide evaluation batches evenly.

  Raises:
    ConfigError: eval.batch_size is not a multiple of the number of processes.
  """
  if config.eval.batch_size % jax.process_count():
    raise ConfigError(
      f"eval.batch_size={config.eval.batch_size}: expected a multiple of the {jax.process_count()} "
      "processes"
    )
