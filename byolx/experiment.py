"""From a config to everything that runs: a recipe and its images. In these two rooms, and nowhere else,
a name in a config becomes an object."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from byolx import compilations, programs, recipe, sharding, train
from byolx.config import ConfigError
from byolx.data import (
  augment,
  cifar,
  folders,
  pipeline,
  randaugment,
  records,
  sources,
  splits,
  tfds,
)
from byolx.recipe import Recipe


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
  views: tuple[augment.ViewSpec, ...]
  named: set[str] = dataclasses.field(default_factory=set)
  kept: programs.Kept = dataclasses.field(default_factory=programs.none)

  def initialise(self) -> train.TrainState:
    """The state at step 0, made where it lives, by a program that is kept."""
    return self._initialiser(self.encoder_key)

  @functools.cached_property
  def _initialiser(self) -> jax.stages.Compiled:
    arguments, state = (self.abstract_key,), self.abstract_state
    if found := self.kept.find("initialise", arguments, state, self._counts):
      return found
    made = train.initialiser(self.task, self.tx, self.layout, state).lower(*arguments)
    return self.kept.compile("initialise", made, arguments, state, self._counts)

  def compile_step(self) -> jax.stages.Compiled:
    """The train step, from where it is kept, or compiled now."""
    arguments, state = self.step_arguments(), self.abstract_state
    if found := self.kept.find("step", arguments, state, self._counts):
      print("the step was compiled in an earlier start, and is loaded", flush=True)
      return found
    return compilations.compile_aloud(
      self.lower(),
      self.mesh.devices.flat[0].platform,
      lambda lowered: self.kept.compile("step", lowered, arguments, state, self._counts),
    )

  @property
  def _counts(self) -> dict[str, int]:
    """What programs depend on besides the config: how many images and classes there are."""
    return {"images": len(self.train_source), "classes": len(self.train_source.classes)}

  @property
  def train_source(self) -> sources.Source:
    """What is trained on."""
    return self.sources.train

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


def build(config: ConfigDict, kept: programs.Kept | None = None) -> Experiment:
  """Builds and checks everything that a config says.

  Args:
    config: all fields.
    kept: its programs, where they were looked for before, see `compilations.begin`.

  Raises:
    ConfigError: fields that do not go together, or images that are not there.
  """
  _check_origin(config)
  images = build_sources(config)
  devices = sharding.find_devices(config)
  made = recipe.build(config, devices, len(images.train), len(images.train.classes))
  _check_evaluation(config)
  kept = kept or programs.of(config, made.mesh.devices.ravel().tolist())
  return Experiment(**vars(made), sources=images, views=build_views(config), kept=kept)


class Sources(NamedTuple):
  """Images to train on, to choose by (data.validation), and to test on (None: not to be looked at)."""

  train: sources.Source
  validation: sources.Source | None
  test: sources.Source | None
  labels: float = 1.0
  """Share of the training images' labels that is used."""

  @property
  def held_out(self) -> tuple[str, sources.Source]:
    """What a run that chooses nothing is measured on, and the name of that split."""
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test


def build_sources(config: ConfigDict) -> Sources:
  """The images of a run.

  With data.validation, pretraining is measured on the validation images and the test images need not
  be there; data.labels and data.label_list choose among what is not held out.

  Raises:
    ConfigError: they are not there, or not enough of them.
  """
  make = _opener(config)
  try:
    train = make(split="train")
    whole = config.data.validation == "none"
    tested = whole or (config.task != "pretrain" and config.eval.test)
    test = make(split="test") if tested else None
  except ValueError as error:
    raise ConfigError(str(error)) from None
  rest, held = np.arange(len(train)), np.empty(0, np.int64)
  if not whole:
    rest, held = _validation(config, train)
  used, held = _used(config, train, rest, held)
  validation = None if whole else sources.subset(train, held)
  if config.task != "pretrain":
    for name, images in (("validation", validation), ("test", test)):
      if images is not None and not (images.labels >= 0).any():
        raise ConfigError(
          f"task={config.task}: none of the {len(images)} {name} images is labelled"
        )
  return Sources(
    train if len(used) == len(train) else sources.subset(train, used),
    validation,
    test,
    round(len(used) / len(train), 4) if config.data.label_list else config.data.labels,
  )


def _opener(config: ConfigDict):
  """The function that opens a split of a config's source."""
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
  return makers[data.source]


def _validation(config: ConfigDict, train: sources.Source) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the rest, and of what data.validation keeps apart."""
  data = config.data
  if data.validation == "share":
    return splits.stratified_holdout(
      train.labels, data.validation_share, sources.SPLIT_SEED, train.names
    )
  try:
    return splits.imagenet_validation(train.names, data.validation)
  except ValueError as error:
    raise ConfigError(
      f"data.validation={data.validation}: {error}; it is meant for ImageNet (data.source=imagenet,"
      " or ImageNet as array_record, tfds or image_folder) and works for any source that large"
    ) from None


def _used(
  config: ConfigDict, train: sources.Source, rest: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of what is trained on, and of what is held out then.

  A list is trained on whole, as all who use it do: its images are not validation images.
  """
  data = config.data
  if data.label_list:
    if data.labels < 1:
      raise ConfigError(
        f"data.labels={data.labels} with data.label_list={data.label_list}: expected one of them"
      )
    try:
      used = splits.listed(train.names, splits.read_list(data.label_list))
    except (OSError, ValueError) as error:
      raise ConfigError(f"data.label_list={data.label_list}: {error}") from None
    return used, np.setdiff1d(held, used)
  if data.labels == 1:
    return rest, held
  try:
    return splits.labelled_share(train.labels, rest, data.labels, data.labels_seed), held
  except ValueError as error:
    raise ConfigError(f"data.labels={data.labels}: {error}") from None


def build_views(config: ConfigDict) -> tuple[augment.ViewSpec, ...]:
  """The distributions T and T' of pretraining (Table 6), or the one that a classifier is trained on.

  Raises:
    ConfigError: RandAugment's settings are impossible.
  """
  rules = {
    "crop_rule": config.views.crop_rule,
    "brightness_rule": config.views.brightness_rule,
  }
  first = augment.ViewSpec(**config.views.view1, **rules)
  if config.task == "pretrain":
    return first, augment.ViewSpec(**config.views.view2, **rules)
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
