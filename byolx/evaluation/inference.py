"""Computes metrics, features and predictions of all images of a data set.

The last batch of a data set is padded to full size with masked rows, which do not count. With several
processes, each process loads its own rows of every batch; the results equal those of one process.
Every process gets the metrics. Features and predictions go only to processes that set `collect`.
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
"""Largest side, in pixels, of images whose raw pixels are used as features. Larger images are shrunk."""


def measure(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float | np.ndarray]:
  """Computes a task's metrics over all batches.

  The metrics do not depend on the batch size, the devices or the number of processes.

  Args:
    task: task whose `evaluate` computes the metrics of a batch.
    model: model of the task.
    batches: evaluation batches, with only the rows of this process.
    mesh: devices that compute.

  Returns:
    Values by the name of the metric, on every process: a float, or an array if the metric has several
    values. The dict is empty if there are no batches.
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
    batches: batches with `image`, `label`, `mask` and `index`, with only the rows of this process.
    mesh: devices that compute.
    collect: whether this process returns the results. If False, this process takes part in the
      computation, but the returned arrays have no rows.

  Returns:
    A tuple of features, labels and indices. The features are a dict: float32 [n, d] by the name of the
    encoder. Its key "pixels" has the raw pixels of the images (shrunk if large), uint8 [n, p]. The
    labels are int32 [n]. The indices are the positions of the images in their data set, int32 [n].
    Masked rows (padding) are left out. Rows are in the order of the batches, and within a batch in the
    order of the processes.
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
  """Computes the predictions (`task.predict`) for all images.

  Args:
    task: task with a function `predict` of a model and a batch.
    model: model of the task.
    batches: evaluation batches, with only the rows of this process.
    mesh: devices that compute.
    collect: whether this process returns the results. If False, this process takes part in the
      computation, but the returned arrays have no rows.

  Returns:
    The arrays of `task.predict` by name, and the arrays `label` and `index` of the images. Masked rows
    (padding) are left out.
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
  """Applies a function to all batches, and concatenates the unmasked rows of its results.

  Masked rows are padding. If `collect` is False, the returned arrays have no rows.
  """
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
  """Flattens each image to a vector of its pixels.

  Images with a side above PIXELS_SIDE are first shrunk to that side.
  """
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
  """Fills the BatchNorm running averages of an untrained encoder with statistics of images, in place.

  Padding must not enter the statistics. So masked rows (padding) are dropped. Then each batch is
  shortened to a multiple of the number of devices and of the encoder's normalisation groups (images
  that are normalised together). A batch with masked rows is used only if no batch was used before.

  Args:
    encoder: untrained encoder, which is changed.
    normalise: function from uint8 images to the encoder's input.
    batches: batches with `image` and `mask`, with only the rows of this process.
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
  """Puts this process's rows of a batch on its devices.

  The rows are first padded with masked rows to a multiple of the number of these devices.
  """
  short = -len(batch["mask"]) % len(mesh.local_devices)

  def padded(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)]) if short else rows

  return sharding.put_batch(jax.tree.map(padded, batch), mesh)
