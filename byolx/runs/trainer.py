"""Recipes: networks, task, optimiser, devices and train step of a run, but not its images.

A recipe needs neither images nor attached devices. So `byolx plan` compiles, ahead of time, the same
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
from byolx.data import transforms
from byolx.data.augment import on_device
from byolx.models.encoder import Network
from byolx.models.resnet import ResNetSpec
from byolx.runs.config import fingerprint
from byolx.tasks import TASKS
from byolx.training import optimizers, schedules, state
from byolx.training.step import compile_step
from byolx.training.task import Batch, Setting, Task


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that a run needs for training except its images, built and checked, but not compiled.

  Args:
    config: config of the run, with all fields.
    layout: mesh (the devices and their axes), and placement of the training state on it.
    encoder: specification of the ResNet of the config group `model`.
    task: training protocol.
    rate: learning rate as a function of the step.
    tx: optimiser.
    abstract_untrained: shapes of a training state without the optimiser's state.
    steps: number of optimiser steps.
    warmup_steps: number of optimiser steps of the warm-up.
    steps_per_epoch: optimiser steps per epoch, not rounded.
    passes: number of forward passes per optimiser step.
    network: the user's own encoder, a function from `nnx.Rngs` to a module; None for the ResNet.
  """

  config: ConfigDict
  layout: sharding.Layout
  encoder: ResNetSpec
  task: Task
  rate: schedules.Schedule
  tx: optax.GradientTransformation
  abstract_untrained: state.TrainState
  steps: int
  warmup_steps: int
  steps_per_epoch: float
  passes: int
  network: Network | None

  @property
  def mesh(self) -> Mesh:
    """The mesh of the run: its devices, with the axes `data` and `fsdp`."""
    return self.layout.mesh

  @property
  def fingerprint(self) -> str:
    """Hash of all config fields that can change results, except the seed."""
    return fingerprint(self.config)

  @property
  def encoder_key(self) -> Array:
    """Random key for the initial parameters."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 0)

  @property
  def step_key(self) -> Array:
    """Random key that train steps pass to the loss."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 1)

  @functools.cached_property
  def rate_at(self) -> Callable[[int], float]:
    """Function that takes a step, from 0, and returns its learning rate.

    The function is jitted, because calling `rate` directly would compile one program per operation.
    """
    compiled = jax.jit(self.rate)
    return lambda step: float(compiled(step))

  def normalise(self, image: Array) -> Array:
    """Normalises uint8 images [..., 3] to the encoder's float32 input."""
    return on_device.network_input(image, self.config.views.mean, self.config.views.std)

  def initialise(self) -> state.TrainState:
    """Computes the training state at step 0, on the devices that hold it."""
    return state.initialise(self.task, self.tx, self.encoder_key, self.layout, self.abstract_state)

  @functools.cached_property
  def abstract_state(self) -> state.TrainState:
    """Shapes, dtypes and shardings of the training state."""
    return state.abstract_state(self.task, self.tx, self.layout, self.abstract_untrained)

  @property
  def abstract_params(self) -> nnx.State:
    """Shapes and dtypes of the trained parameters."""
    return self.abstract_untrained.params

  def abstract_batch(self) -> Batch:
    """Returns shapes, dtypes and shardings of a training batch."""
    rows, spread = self.config.train.batch_size, sharding.by_example(self.mesh)
    arrays = {name: transforms.Array((), np.int32) for name in ("label", "index")}

    def abstract(array: transforms.Array) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=spread)

    def is_array(value: Any) -> bool:
      return isinstance(value, transforms.Array)

    arrays |= self.task.transform("train").arrays
    return jax.tree.map(abstract, arrays, is_leaf=is_array)

  def lower(self) -> jax.stages.Lowered:
    """Lowers the train step: translates it to the form from which it is compiled.

    The devices of the run need not be attached.
    """
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
    """Returns shapes, dtypes and shardings of the train step's arguments: state, batch and random key."""
    return self.abstract_state, self.abstract_batch(), self.abstract_key

  @property
  def abstract_key(self) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a random key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(self.mesh))


def build(
  config: ConfigDict,
  devices: Sequence[Any],
  images: int,
  classes: int,
  network: Network | None = None,
) -> Recipe:
  """Builds and checks the recipe of a config: all that a run needs for training except its images.

  Args:
    config: config of the run, with all fields.
    devices: devices of the run, attached or not.
    images: number of training images.
    classes: number of classes of the images; 0 without labels.
    network: the user's own encoder, a function from `nnx.Rngs` to a module; None for the ResNet.

  Raises:
    ConfigError: values of fields do not fit each other, the devices or the number of images.
  """
  layout = build_layout(config, devices)
  passes = _check_batch(config, layout.mesh, images)
  steps, warmup_steps = count_steps(config, images)
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
  encoder = build_encoder(config, products=on_cpu)
  task = build_task(config, Setting(config, encoder, classes, steps, network))
  untrained = state.abstract_untrained(task)
  optimizer = optimizers.OptimizerSpec(**config.optim)
  rate, tx = optimizer.build(untrained.params, config.train.batch_size, steps, warmup_steps)
  return Recipe(
    config,
    layout,
    encoder,
    task,
    rate,
    tx,
    untrained,
    steps,
    warmup_steps,
    images / config.train.batch_size,
    passes,
    network,
  )


def build_layout(config: ConfigDict, devices: Sequence[Any]) -> sharding.Layout:
  """Builds the mesh of a config (the devices and their axes), and the placement of the state on it.

  Args:
    config: config of the run, with all fields.
    devices: devices of the run, attached or not.

  Raises:
    ConfigError: the devices cannot be divided as the config group `mesh` requires.
  """
  try:
    return sharding.lay_out(sharding.MeshSpec(**config.mesh), devices)
  except ValueError as error:
    raise ConfigError(str(error)) from None


def count_steps(config: ConfigDict, images: int) -> tuple[int, int]:
  """Computes the number of all optimiser steps, and the number of warm-up steps (appendix J.1).

  Args:
    config: config of the run, with all fields.
    images: number of training images.

  Returns:
    The two numbers. The warm-up steps are the first of all steps.

  Raises:
    ConfigError: there are no steps after the warm-up.
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
  """Builds the specification of the ResNet of a config.

  Args:
    config: config of the run, with all fields.
    products: whether to compute 1x1 convolutions as matrix products, which is faster on CPUs; None to
      do so if jax's default backend is a CPU.

  Raises:
    ConfigError: values of the config group `model` do not fit each other.
  """
  try:
    return ResNetSpec(**config.model, products=products)
  except ValueError as error:
    raise ConfigError(str(error)) from None


def build_task(config: ConfigDict, setting: Setting) -> Task:
  """Builds the task (training protocol) of a run.

  Args:
    config: config of the run, with all fields.
    setting: facts about the run from which the task is built, such as its number of steps.

  Raises:
    ConfigError: values of fields do not fit each other.
  """
  kind = TASKS[config.task]
  if config.optim.rates and not kind.parallel_rates:
    raise ConfigError(
      f"optim.rates={tuple(config.optim.rates)} with task={config.task}: several rates are trained in "
      "one run on a frozen encoder only (task=linear); expected optim.base_rate, or a sweep"
    )
  return kind.build(setting)


def build_input(config: ConfigDict, classes: int) -> transforms.Transform:
  """Builds the transform of the training images, for commands that need only the input.

  Args:
    config: config of the run, with all fields.
    classes: number of classes of the images; 0 without labels.

  Raises:
    ConfigError: values of fields do not fit each other.
  """
  config = config.copy_and_resolve_references()
  config.eval.resize = max(config.eval.resize, config.views.size)  # no evaluation image is made
  return build_task(config, Setting(config, build_encoder(config), classes, 1)).transform("train")


def _check_batch(config: ConfigDict, mesh: Mesh, images: int) -> int:
  """Checks the batch size, and returns the number of forward passes per optimiser step.

  Args:
    config: config of the run, with all fields.
    mesh: devices of the run.
    images: number of training images.

  Raises:
    ConfigError: the batch is larger than the training set, or cannot be divided evenly into passes,
      devices or BatchNorm groups.
  """
  batch, micro = config.train.batch_size, config.train.micro_batch or config.train.batch_size
  if batch > images:
    raise ConfigError(
      f"train.batch_size={batch}: expected at most the {images} training images of "
      f"data.source={config.data.source}"
    )
  if batch % micro:
    raise ConfigError(f"train.micro_batch={micro}: expected a divisor of train.batch_size={batch}")
  if micro % mesh.size:
    nearest = [
      size for size in (micro // mesh.size * mesh.size, -(-micro // mesh.size) * mesh.size) if size
    ]
    name = "train.micro_batch" if config.train.micro_batch else "train.batch_size"
    raise ConfigError(
      f"{name}={micro}: expected a multiple of the mesh's {mesh.size} devices, such as "
      f"{' or '.join(map(str, nearest))}; or set mesh.data"
    )
  group = config.model.bn_group
  if group and micro % group:
    raise ConfigError(f"model.bn_group={group}: expected a divisor of the {micro} images of a pass")
  return batch // micro
