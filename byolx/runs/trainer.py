"""Everything of a run but its images: networks, loss, optimiser, mesh, and the step they make.

A recipe needs no images and no attached devices: what `byolx plan` compiles ahead of time is the very
program that `byolx train` runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.data.augment import distribution, on_device
from byolx.models.byol import BYOLSpec
from byolx.models.classifier import ClassifierSpec
from byolx.models.resnet import ResNetSpec
from byolx.runs.config import fingerprint
from byolx.tasks.classify import Classify
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers, schedules, state
from byolx.training.step import compile_step
from byolx.training.task import Batch


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a config says of training, built and checked; nothing is compiled yet.

  Args:
    config: all fields.
    layout: the mesh, and where the state lives on it.
    task: networks and loss.
    rate: learning rate by step.
    tx: the optimiser.
    abstract_untrained: shapes of a state without the optimiser's.
    steps, warmup_steps: optimiser steps.
    steps_per_epoch: not rounded.
    passes: forward passes per step.
  """

  config: ConfigDict
  layout: sharding.Layout
  task: Pretrain | Classify
  rate: schedules.Schedule
  tx: optax.GradientTransformation
  abstract_untrained: state.TrainState
  steps: int
  warmup_steps: int
  steps_per_epoch: float
  passes: int

  @property
  def mesh(self) -> Mesh:
    """The devices."""
    return self.layout.mesh

  @property
  def fingerprint(self) -> str:
    """Tells configs apart in what shapes results."""
    return fingerprint(self.config)

  @property
  def encoder_key(self) -> Array:
    """The key that parameters are made from."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 0)

  @property
  def step_key(self) -> Array:
    """The key that losses draw from."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 1)

  @functools.cached_property
  def rate_at(self) -> Callable[[int], float]:
    """The learning rate at a step, counted from 0: one small program, where `rate` would be many."""
    compiled = jax.jit(self.rate)
    return lambda step: float(compiled(step))

  def normalise(self, image: Array) -> Array:
    """uint8 images as the encoder takes them."""
    return on_device.network_input(image, *_colours(self.config))

  def initialise(self) -> state.TrainState:
    """The state at step 0, made where it lives."""
    return state.initialise(self.task, self.tx, self.encoder_key, self.layout, self.abstract_state)

  @functools.cached_property
  def abstract_state(self) -> state.TrainState:
    """Shapes, types and shardings of the state."""
    return state.abstract_state(self.task, self.tx, self.layout, self.abstract_untrained)

  @property
  def abstract_params(self) -> nnx.State:
    """Shapes of what is trained."""
    return self.abstract_untrained.params

  def abstract_batch(self) -> Batch:
    """Shapes, types and shardings of what `loader.train_batches` makes and a step uses."""
    rows, size = self.config.train.batch_size, self.config.views.size
    spread = sharding.by_example(self.mesh)

    def shape_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=spread)

    batch = {name: shape_of((), np.int32) for name in ("label", "index")}
    views = (1, 2) if self.config.task == "pretrain" else (1,)
    batch |= {f"view{view}": shape_of((size, size, 3), np.uint8) for view in views}
    if self.task.augment_on_device:
      one = distribution.draw(distribution.ViewSpec(), np.random.default_rng(0), size, size)
      drawn = jax.tree.map(lambda x: shape_of(np.shape(x), np.asarray(x).dtype), one)
      batch |= {f"draws{view}": drawn for view in views}
    return batch

  def lower(self) -> jax.stages.Lowered:
    """The train step as one program for the mesh's devices, attached or not; `compile` is next."""
    step = compile_step(
      self.task,
      self.tx,
      self.layout,
      passes=self.passes,
      remat=self.config.train.remat,
      abstract=self.abstract_state,
    )
    platform = self.mesh.devices.flat[0].platform
    traced = step.trace(*self.step_arguments())
    return traced.lower(lowering_platforms=(platform,))

  def step_arguments(self) -> tuple[state.TrainState, Batch, jax.ShapeDtypeStruct]:
    """What a train step takes: shapes, types and shardings of state, batch and key."""
    return self.abstract_state, self.abstract_batch(), self.abstract_key

  @property
  def abstract_key(self) -> jax.ShapeDtypeStruct:
    """What every key is."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(self.mesh))


def build(config: ConfigDict, devices: Sequence[Any], images: int, classes: int) -> Recipe:
  """Builds and checks all that a config says of training.

  Args:
    config: all fields.
    devices: to train on, attached or not.
    images: to train on.
    classes: of the online probe.

  Raises:
    ConfigError: fields that do not go together.
  """
  layout = build_layout(config, devices)
  passes = _check_batch(config, layout.mesh, images)
  steps, warmup_steps = count_steps(config, images)
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
  task = build_task(config, classes, steps, products=on_cpu)
  untrained = state.abstract_untrained(task)
  optimizer = optimizers.OptimizerSpec(**config.optim)
  rate, tx = optimizer.build(untrained.params, config.train.batch_size, steps, warmup_steps)
  return Recipe(
    config,
    layout,
    task,
    rate,
    tx,
    untrained,
    steps,
    warmup_steps,
    images / config.train.batch_size,
    passes,
  )


def build_layout(config: ConfigDict, devices: Sequence[Any]) -> sharding.Layout:
  """The mesh, and where the state lives on it.

  Raises:
    ConfigError: the devices cannot be cut as the config says.
  """
  try:
    return sharding.lay_out(sharding.MeshSpec(**config.mesh), devices)
  except ValueError as error:
    raise ConfigError(str(error)) from None


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


def build_encoder(config: ConfigDict, products: bool | None = None) -> ResNetSpec:
  """The encoder; for `products` see `layers.Conv`.

  Raises:
    ConfigError: its stages do not go together.
  """
  try:
    return ResNetSpec(**config.model, products=products)
  except ValueError as error:
    raise ConfigError(str(error)) from None


def build_task(
  config: ConfigDict, classes: int, steps: int, products: bool | None = None
) -> Pretrain | Classify:
  """What a config trains; for `products` see `layers.Conv`.

  Raises:
    ConfigError: fields that do not go together.
  """
  if config.optim.rates and config.task != "linear":
    raise ConfigError(
      f"optim.rates={tuple(config.optim.rates)} with task={config.task}: rates go side by side on a "
      "frozen encoder only (task=linear); expected optim.base_rate, or a sweep"
    )
  if config.task == "pretrain":
    return _pretraining(config, classes, steps, products)
  return _classification(config, classes, products)


def _colours(config: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
  return tuple(config.views.mean), tuple(config.views.std)


def _classification(config: ConfigDict, classes: int, products: bool | None) -> Classify:
  c = config.classify
  heads = max(1, len(config.optim.rates))
  if classes < 2:
    raise ConfigError(
      f"task={config.task}: the images of data.source={config.data.source} have {classes} classes; "
      "expected labels of at least two"
    )
  if heads > 1 and config.optim.name != "sgd":
    raise ConfigError(
      f"optim.rates={tuple(config.optim.rates)} with optim.name={config.optim.name}: its steps are not "
      "proportional to the rate of one classifier alone; expected optim.name=sgd"
    )
  if heads > 1 and config.data.validation == "none":
    raise ConfigError(
      f"optim.rates={tuple(config.optim.rates)} with data.validation=none: expected validation images "
      "to choose by, or one rate"
    )
  if c.views == "randaugment" and config.views.placement == "device":
    raise ConfigError(
      "classify.views=randaugment with views.placement=device: RandAugment is work of the host; "
      "expected views.placement=host"
    )
  encoder = build_encoder(config, products)
  init = nnx.initializers.zeros_init() if c.head_init == "zeros" else encoder.initializer
  mean, std = _colours(config)
  return Classify(
    ClassifierSpec(encoder, classes, heads, init),
    frozen=config.task == "linear",
    mean=mean,
    std=std,
    alpha=c.tclip,
    beta=c.logit_penalty,
    smoothing=c.label_smoothing,
    augment_on_device=config.views.placement == "device",
    brightness_rule=config.views.brightness_rule,
  )


def _pretraining(config: ConfigDict, classes: int, steps: int, products: bool | None) -> Pretrain:
  """Without labels there is no online probe."""
  byol, views = config.byol, config.views
  mean, std = _colours(config)
  spec = BYOLSpec(
    build_encoder(config, products),
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
    mean=mean,
    std=std,
    tau_base=byol.tau_base,
    tau_rule=byol.tau_rule,
    average_statistics=byol.average_statistics,
    directions=byol.directions,
    norm_guard=byol.norm_guard,
    probe_weight=byol.probe_weight,
    augment_on_device=views.placement == "device",
    brightness_rule=views.brightness_rule,
  )


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
  group = config.model.bn_group
  if group and micro % group:
    raise ConfigError(f"model.bn_group={group}: expected a divisor of the {micro} images of a pass")
  return batch // micro
