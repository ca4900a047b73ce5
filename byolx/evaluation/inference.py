"""Inference over a whole data set: metrics, features and predictions, in padded and masked batches.

With several processes, each has its block of rows of every batch, from `loader.evaluation_batches`. The
results equal those of one process. Metrics are returned on every process; features and predictions on
those that set `collect`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from byolx.core import sharding
from byolx.models.batch_norm import BatchNorm
from byolx.training.task import Batch, Task

PIXELS_SIDE = 32
"""Largest side, in pixels, of the images whose raw pixels are features; larger ones are reduced."""


def measure(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float | np.ndarray]:
  """Computes the task's metrics over all batches; they do not depend on batch size, mesh or processes.

  Args:
    task: task whose `evaluate` computes the metrics of a batch.
    model: model of the task.
    batches: rows of this process of each evaluation batch.
    mesh: devices that compute.

  Returns:
    Values by name, on every process: a float, or an array for a metric with several values; empty
    without batches.
  """
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def evaluate(state: nnx.State, batch: Batch) -> metrics.Collection:
    return task.evaluate(nnx.merge(graphdef, state), batch)

  total = None
  for batch in batches:
    current = evaluate(state, _placed(batch, mesh))
    total = current if total is None else total.merge(current)
  if total is None:
    return {}
  return {
    name: np.asarray(value) if np.ndim(value) else float(value)
    for name, value in total.compute().items()
  }


def features(
  encoders: dict[str, nnx.Module],
  normalise: Callable[[Array], Array],
  batches: Iterable[Batch],
  mesh: Mesh,
  *,
  collect: bool = True,
) -> tuple[dict[str, Float[np.ndarray, "n d"]], np.ndarray, np.ndarray]:
  """Computes the representations of all images by several frozen encoders, and their raw pixels.

  Args:
    encoders: encoders by name, called with `train=False`.
    normalise: function from uint8 images to the encoders' input.
    batches: rows of this process of each batch, with `image`, `label`, `mask` and `index`.
    mesh: devices that compute.
    collect: True to return the results on this process. If False, it computes its part, and the
      returned arrays have no rows.

  Returns:
    Features by name of the encoder, float32 [n, d], and "pixels", uint8, see `raw_pixels`; labels, int32
    [n]; indices of records, int32 [n]. Masked rows are left out. Rows are in the order of the batches,
    and within a batch in the order of processes.
  """
  split = {name: nnx.split(encoder) for name, encoder in encoders.items()}

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def encode(states: dict[str, nnx.State], batch: Batch) -> Batch:
    x = normalise(batch["image"])
    encoded = {
      name: nnx.merge(split[name][0], state)(x, train=False).astype(jnp.float32)
      for name, state in states.items()
    }
    return encoded | {name: batch[name] for name in ("pixels", "label", "index", "mask")}

  states = {name: state for name, (_, state) in split.items()}
  with_pixels = (batch | {"pixels": raw_pixels(batch["image"])} for batch in batches)
  joined = _unmasked(functools.partial(encode, states), with_pixels, mesh, collect)
  return joined, joined.pop("label"), joined.pop("index")


def predictions(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh, *, collect: bool = True
) -> dict[str, np.ndarray]:
  """Computes `task.predict` for all images.

  Args:
    task: task with a function `predict` of a model and a batch.
    model: model of the task.
    batches: rows of this process of each evaluation batch.
    mesh: devices that compute.
    collect: True to return the results on this process, as in `features`.

  Returns:
    Arrays of `task.predict` for the unmasked images, and their `label` and `index`.
  """
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def predict(state: nnx.State, batch: Batch) -> Batch:
    outputs = task.predict(nnx.merge(graphdef, state), batch)
    return outputs | {name: batch[name] for name in ("label", "index", "mask")}

  return _unmasked(functools.partial(predict, state), batches, mesh, collect)


def _unmasked(
  function: Callable[[Batch], Batch], batches: Iterable[Batch], mesh: Mesh, collect: bool
) -> dict[str, np.ndarray]:
  """Concatenates the unmasked rows of a function of all batches; without `collect`, no rows."""
  collected: dict[str, list[np.ndarray]] = {}
  for batch in batches:
    for name, rows in function(_placed(batch, mesh)).items():
      # The array is whole on every device; shards on other processes' devices cannot be read.
      collected.setdefault(name, []).append(np.asarray(rows.addressable_data(0)))
    keep = collected.pop("mask")[0] & collect
    for rows in collected.values():
      rows[-1] = rows[-1][keep]
  return {name: np.concatenate(rows) for name, rows in collected.items()}


def raw_pixels(images: UInt8[np.ndarray, "b s s 3"]) -> UInt8[np.ndarray, "b d"]:
  """Flattens images to vectors of pixels, after reducing them to a side of at most PIXELS_SIDE."""
  if images.shape[1] > PIXELS_SIDE:
    size = (PIXELS_SIDE, PIXELS_SIDE)
    small = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in images]
    images = np.stack(small) if small else images[:, :PIXELS_SIDE, :PIXELS_SIDE]
  return images.reshape(len(images), math.prod(images.shape[1:]))


def warm_statistics(
  encoder: nnx.Module,
  normalise: Callable[[Array], Array],
  batches: Iterator[Batch],
  mesh: Mesh,
) -> None:
  """Sets the BatchNorm running averages of an untrained encoder to those of images, in place.

  Padding must not enter the statistics. So masked rows are dropped, each batch is cut to a multiple of
  the number of devices and of the encoder's normalisation groups, and a batch with masked rows is used
  only if no batch was used before.

  Args:
    encoder: untrained encoder, which is changed.
    normalise: function from uint8 images to the encoder's input.
    batches: rows of this process of each batch, with `image` and `mask`.
    mesh: devices that compute.
  """
  graphdef, state = nnx.split(encoder)
  norms = (module for _, module in nnx.iter_modules(encoder) if isinstance(module, BatchNorm))
  divisor = math.lcm(mesh.size, *{norm.group or 1 for norm in norms})

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding.replicated(mesh))
  def update(state: nnx.State, image: Array, rows: Array) -> nnx.State:
    model = nnx.merge(graphdef, state)
    image = jax.lax.with_sharding_constraint(image[rows], sharding.by_example(mesh))
    model(normalise(image), train=True)
    return nnx.state(model)

  masks = jax.jit(lambda mask: mask, out_shardings=sharding.replicated(mesh))
  state = jax.tree.map(jnp.copy, state)
  warm = False
  for batch in batches:
    placed = _placed({"image": batch["image"], "mask": batch["mask"]}, mesh)
    rows = np.flatnonzero(masks(placed["mask"]).addressable_data(0))
    complete = len(rows) == len(batch["mask"]) * jax.process_count()
    rows = rows[: len(rows) // divisor * divisor]
    if len(rows) and (complete or not warm):
      state = update(state, placed["image"], rows)
      warm = True
  nnx.update(encoder, state)


def _placed(batch: Batch, mesh: Mesh) -> Batch:
  """Puts a batch on the mesh, padded with masked rows to a multiple of this process's devices."""
  short = -len(batch["mask"]) % len(mesh.local_devices)

  def padded(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)]) if short else rows

  return sharding.put_batch(jax.tree.map(padded, batch), mesh)
