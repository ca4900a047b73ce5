"""Recipes: networks, task, optimiser, mesh and train step of a run, without its images.

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
  """Training parts of a config, built and checked, but not compiled.

  Args:
    config: all fields.
    layout: mesh, and placement of the state on it.
    encoder: ResNet of the config group `model`.
    task: training protocol.
    rate: learning rate by step.
    tx: optimiser.
    abstract_untrained: shapes of a state without the optimiser's state.
    steps: number of optimiser steps.
    warmup_steps: number of optimiser steps of the warm-up.
    steps_per_epoch: optimiser steps per epoch, not rounded.
    passes: forward passes per optimiser step.
    network: the user's own encoder, see `task.Setting`; None for the ResNet.
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
    """The devices of the run, with the axes `data` and `fsdp`."""
    return self.layout.mesh

  @property
  def fingerprint(self) -> str:
    """Hash of the fields on which results depend, see `config.fingerprint`."""
    return fingerprint(self.config)

  @property
  def encoder_key(self) -> Array:
    """Random key of the initial parameters."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 0)

  @property
  def step_key(self) -> Array:
    """Random key of the losses."""
    return jax.random.fold_in(jax.random.key(self.config.seed), 1)

  @functools.cached_property
  def rate_at(self) -> Callable[[int], float]:
    """Function from a step, from 0, to its learning rate.

    It is jitted: evaluating `rate` directly would compile one program per operation.
    """
    compiled = jax.jit(self.rate)
    return lambda step: float(compiled(step))

  def normalise(self, image: Array) -> Array:
    """Normalises uint8 images [..., 3] to the encoder's float32 input."""
    return on_device.network_input(image, self.config.views.mean, self.config.views.std)

  def initialise(self) -> state.TrainState:
    """Computes the state at step 0, on the devices that hold it."""
    return state.initialise(self.task, self.tx, self.encoder_key, self.layout, self.abstract_state)

  @functools.cached_property
  def abstract_state(self) -> state.TrainState:
    """Shapes, dtypes and shardings of the state."""
    return state.abstract_state(self.task, self.tx, self.layout, self.abstract_untrained)

  @property
  def abstract_params(self) -> nnx.State:
    """Shapes of the trained parameters."""
    return self.abstract_untrained.params

  def abstract_batch(self) -> Batch:
    """Shapes, dtypes and shardings of a batch of `loader.train_batches`."""
    rows, spread = self.config.train.batch_size, sharding.by_example(self.mesh)
    arrays = {name: transforms.Array((), np.int32) for name in ("label", "index")}

    def abstract(array: transforms.Array) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=spread)

    def is_array(value: Any) -> bool:
      return isinstance(value, transforms.Array)

    arrays |= self.task.transform("train").arrays
    return jax.tree.map(abstract, arrays, is_leaf=is_array)

  def lower(self) -> jax.stages.Lowered:
    """Lowers the train step for the mesh's devices, which need not be attached."""
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
    """Shapes, dtypes and shardings of the train step's arguments: state, batch and key."""
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
  """Builds and checks the recipe of a config.

  Args:
    config: all fields.
    devices: devices of the run, attached or not.
    images: number of training images.
    classes: number of classes of the images, 0 without labels.
    network: the user's own encoder, see `task.Setting`; None for the ResNet.

  Raises:
    ConfigError: fields do not go together.
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
  """Builds the mesh of a config, with the placement of the state on it.

  Raises:
    ConfigError: the devices cannot be divided as the config group `mesh` requires.
  """
  try:
    return sharding.lay_out(sharding.MeshSpec(**config.mesh), devices)
  except ValueError as error:
    raise ConfigError(str(error)) from None


def count_steps(config: ConfigDict, images: int) -> tuple[int, int]:
  """Returns the numbers of optimiser steps and of warm-up steps among them (appendix J.1).

  Args:
    config: all fields.
    images: number of training images.

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
  """Builds the ResNet of a config.

  Args:
    config: all fields.
    products: True to compute 1x1 convolutions as matrix products, see `layers.Conv`.

  Raises:
    ConfigError: the fields of its stages do not go together.
  """
  try:
    return ResNetSpec(**config.model, products=products)
  except ValueError as error:
    raise ConfigError(str(error)) from None


def build_task(config: ConfigDict, setting: Setting) -> Task:
  """Builds the task of a run.

  Raises:
    ConfigError: fields do not go together.
  """
  kind = TASKS[config.task]
  if config.optim.rates and not kind.parallel_rates:
    raise ConfigError(
      f"optim.rates={tuple(config.optim.rates)} with task={config.task}: several rates are trained in "
      "one run on a frozen encoder only (task=linear); expected optim.base_rate, or a sweep"
    )
  return kind.build(setting)


def build_input(config: ConfigDict, classes: int) -> transforms.Transform:
  """Builds the training transform of a config, for commands that need only the input.

  Args:
    config: all fields.
    classes: number of classes of the images, 0 without labels.

  Raises:
    ConfigError: fields do not go together.
  """
  config = config.copy_and_resolve_references()
  config.eval.resize = max(config.eval.resize, config.views.size)  # no evaluation image is made
  return build_task(config, Setting(config, build_encoder(config), classes, 1)).transform("train")


def _check_batch(config: ConfigDict, mesh: Mesh, images: int) -> int:
  """Returns the forward passes per step; refuses batch sizes that cannot be divided evenly."""
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
