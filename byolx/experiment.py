"""From a config to everything that runs: the only place where a name in a config becomes an object."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from byolx import distributed, optim, schedules, sharding
from byolx.config import ConfigError
from byolx.data import (
  augment,
  augment_device,
  cifar,
  folders,
  pipeline,
  records,
  sources,
  splits,
  tfds,
)
from byolx.models.byol import BYOLSpec
from byolx.models.layers import INITIALIZERS
from byolx.models.resnet import ARCHITECTURES, STEMS, ResNetSpec, widen
from byolx.tasks.pretrain import Pretrain

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config describes, built and checked; nothing is compiled yet.

  Args:
    config: all fields.
    train_source, test_source: images.
    views: the distributions T and T'.
    mesh: devices.
    task: networks and loss.
    rate: learning rate by step.
    tx: the optimiser.
    abstract_params: shapes of what it trains.
    steps, warmup_steps: optimiser steps.
    steps_per_epoch: not rounded.
    passes: forward passes per step.
    key: of parameters and everything drawn in steps.
    named: unreadable files that were named so far.
  """

  config: ConfigDict
  train_source: sources.Source
  test_source: sources.Source
  views: tuple[augment.ViewSpec, augment.ViewSpec]
  mesh: Mesh
  task: Pretrain
  rate: schedules.Schedule
  tx: optax.GradientTransformation
  abstract_params: nnx.State
  steps: int
  warmup_steps: int
  steps_per_epoch: float
  passes: int
  key: Array
  named: set[str] = dataclasses.field(default_factory=set)

  @property
  def encoder_key(self) -> Array:
    """The key that parameters are made from."""
    return jax.random.fold_in(self.key, 0)

  @property
  def step_key(self) -> Array:
    """The key that losses draw from."""
    return jax.random.fold_in(self.key, 1)

  def normalise(self, image: Array) -> Array:
    """uint8 images as the encoder takes them."""
    return augment_device.normalise(
      image.astype(jnp.float32) / 255.0, self.task.mean, self.task.std
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


def build(config: ConfigDict) -> Experiment:
  """Builds and checks everything that a config says.

  Raises:
    ConfigError: fields that do not go together, or images that are not there.
  """
  train_source, test_source = build_sources(config)
  of_pass = config.train.micro_batch or config.train.batch_size
  sharding.split_cpu(of_pass // distributed.count(), config.mesh.cpu_devices)
  try:
    mesh = sharding.make_mesh(config.mesh.data)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  passes = _check_batch(config, mesh, len(train_source))
  _check_views(config)
  steps, warmup_steps = count_steps(config, len(train_source))
  task = build_task(config, len(train_source.classes), steps)
  rate, tx, abstract = build_optimiser(config, task, warmup_steps)
  return Experiment(
    config,
    train_source,
    test_source,
    build_views(config),
    mesh,
    task,
    rate,
    tx,
    abstract,
    steps,
    warmup_steps,
    len(train_source) / config.train.batch_size,
    passes,
    jax.random.key(config.seed),
  )


def count_steps(config: ConfigDict, images: int) -> tuple[int, int]:
  """Optimiser steps for so many training images, and how many of them warm up (appendix J.1).

  Raises:
    ConfigError: there are no more steps than warm-up.
  """
  epochs, warmup_epochs = config.train.epochs, config.optim.warmup_epochs
  steps = math.floor(epochs * images / config.train.batch_size)
  warmup_steps = math.floor(warmup_epochs * images / config.train.batch_size)
  if warmup_steps >= steps:
    raise ConfigError(
      f"train.epochs={epochs} with optim.warmup_epochs={warmup_epochs}: {steps} steps with "
      f"{warmup_steps} of warm-up; expected more steps than warm-up"
    )
  return steps, warmup_steps


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


def build_encoder(config: ConfigDict) -> ResNetSpec:
  """The encoder's shape."""
  model = config.model
  spec = ARCHITECTURES.get(model.arch)
  custom = {name: tuple(model[name]) for name in ("blocks", "channels", "strides")}
  if spec is None:
    lengths = {len(values) for name, values in custom.items() if values or name != "strides"}
    if len(lengths) != 1 or 0 in lengths:
      given = ", ".join(f"model.{name}={values}" for name, values in custom.items())
      raise ConfigError(f"model.arch=custom with {given}: expected one number per stage in each")
    spec = ResNetSpec(**custom, bottleneck=model.bottleneck)
  elif any(custom.values()):
    given = ", ".join(f"model.{name}={values}" for name, values in custom.items() if values)
    raise ConfigError(f"{given}: only for model.arch=custom; model.arch is {model.arch}")
  spec = dataclasses.replace(
    spec,
    stem=STEMS[model.stem],
    stem_channels=model.stem_channels,
    padding=model.padding,
    dilation=model.dilation,
    bn_decay=model.bn_decay,
    bn_eps=model.bn_eps,
    bn_group=model.bn_group,
    bn_debias=model.bn_debias,
    bn_last_scale=model.bn_last_scale,
    kernel_init=INITIALIZERS[model.kernel_init],
    dtype=DTYPES[model.dtype],
  )
  return widen(spec, model.width)


def build_task(config: ConfigDict, classes: int, steps: int) -> Pretrain:
  """The pretraining task; without labels there is no online probe."""
  byol, views = config.byol, config.views
  spec = BYOLSpec(
    build_encoder(config),
    projection_size=byol.projection_size,
    projector_hidden=byol.projector_hidden,
    projector_depth=byol.projector_depth,
    predictor_hidden=byol.predictor_hidden,
    predictor_depth=byol.predictor_depth,
    output_bias=byol.output_bias,
    predictor=byol.predictor,
    target=byol.target,
    target_init=byol.target_init,
    classes=classes if byol.probe_weight else 0,
  )
  return Pretrain(
    spec,
    steps,
    mean=tuple(views.mean),
    std=tuple(views.std),
    tau_base=byol.tau_base,
    tau_rule=byol.tau_rule,
    average_statistics=byol.average_statistics,
    directions=byol.directions,
    norm_guard=byol.norm_guard,
    probe_weight=byol.probe_weight,
    augment_on_device=views.placement == "device",
    brightness_rule=views.brightness_rule,
  )


def build_optimiser(
  config: ConfigDict, task: Pretrain, warmup_steps: int
) -> tuple[schedules.Schedule, optax.GradientTransformation, nnx.State]:
  """The learning rate by step, the optimiser, and the shapes of what it trains."""
  model = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
  params = nnx.split(model, task.trainable, ...)[1]
  mask = optim.adapted(params)
  o = config.optim
  if not o.exclude:
    mask = jax.tree.map(lambda _: True, mask)
  peak = o.base_rate * config.train.batch_size / 256
  rate = schedules.warmup_cosine(peak, warmup_steps, task.steps)
  makers = {
    "lars": functools.partial(optim.lars, rate, o.weight_decay, o.momentum, o.trust),
    "sgd": functools.partial(optim.sgd, rate, o.weight_decay, o.momentum),
    "adamw": functools.partial(optim.adamw, rate, o.weight_decay),
  }
  return rate, makers[o.name](mask), params


def _check_batch(config: ConfigDict, mesh: Mesh, images: int) -> int:
  """Forward passes per step; refuses sizes that cannot be cut evenly."""
  batch, micro = config.train.batch_size, config.train.micro_batch or config.train.batch_size
  if batch > images:
    raise ConfigError(
      f"train.batch_size={batch}: expected at most the {images} training images of "
      f"data.source={config.data.source}"
    )
  if batch % micro:
    raise ConfigError(f"train.micro_batch={micro}: expected a divisor of train.batch_size={batch}")
  if micro % mesh.size:
    near = [
      size for size in (micro // mesh.size * mesh.size, -(-micro // mesh.size) * mesh.size) if size
    ]
    name = "train.micro_batch" if config.train.micro_batch else "train.batch_size"
    raise ConfigError(
      f"{name}={micro}: expected a multiple of the mesh's {mesh.size} devices, such as "
      f"{' or '.join(map(str, near))}; or set mesh.data"
    )
  if config.eval.batch_size % jax.process_count():
    raise ConfigError(
      f"eval.batch_size={config.eval.batch_size}: expected a multiple of the {jax.process_count()} "
      "processes"
    )
  group = config.model.bn_group
  if group and micro % group:
    raise ConfigError(f"model.bn_group={group}: expected a divisor of the {micro} images of a pass")
  return batch // micro


def _check_views(config: ConfigDict) -> None:
  if config.eval.resize < config.views.size:
    raise ConfigError(
      f"eval.resize={config.eval.resize}: the centre crop of views.size={config.views.size} is "
      "larger than the image; expected eval.resize of at least views.size"
    )
