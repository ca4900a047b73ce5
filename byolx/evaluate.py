"""Evaluation over a whole set: padded and masked batches, features of frozen encoders, metrics."""

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

from byolx import sharding
from byolx.models.norm import BatchNorm
from byolx.tasks.base import Batch, Task

PIXELS_SIDE = 32
"""Larger images are averaged down to this side before their raw pixels count as features."""


def measure(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
  """The task's metrics over all batches, exact for any batch size and any mesh."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def one(state: nnx.State, batch: Batch) -> metrics.Collection:
    return task.evaluate(nnx.merge(graphdef, state), batch)

  total = None
  for batch in batches:
    current = one(state, _placed(batch, mesh))
    total = current if total is None else total.merge(current)
  if total is None:
    return {}
  return {name: float(value) for name, value in total.compute().items()}


def features(
  encoders: dict[str, nnx.Module],
  normalise: Callable[[Array], Array],
  batches: Iterable[Batch],
  mesh: Mesh,
) -> tuple[dict[str, Float[np.ndarray, "n d"]], np.ndarray, np.ndarray]:
  """Representations of every image by several frozen encoders, and the images' raw pixels.

  Args:
    encoders: by name; called with `train=False`.
    normalise: uint8 images to what the encoders take.
    batches: with `image`, `label`, `mask`.
    mesh: where the work runs.

  Returns:
    Features by encoder name, "pixels" (see `raw_pixels`) among them; labels; indices.
  """
  split = {name: nnx.split(encoder) for name, encoder in encoders.items()}

  @jax.jit
  def encode(states: dict[str, nnx.State], image: Array) -> dict[str, Array]:
    x = normalise(image)
    return {
      name: nnx.merge(split[name][0], state)(x, train=False).astype(jnp.float32)
      for name, state in states.items()
    }

  states = {name: state for name, (_, state) in split.items()}
  found: dict[str, list[np.ndarray]] = {name: [] for name in [*encoders, "pixels"]}
  labels, indices = [], []
  for batch in batches:
    keep = batch["mask"]
    encoded = encode(states, _placed(batch, mesh)["image"])
    for name, rows in encoded.items():
      found[name].append(np.asarray(rows)[: len(keep)][keep])
    found["pixels"].append(raw_pixels(batch["image"][keep]))
    labels.append(batch["label"][keep])
    indices.append(batch["index"][keep])
  joined = {name: np.concatenate(rows) for name, rows in found.items()}
  return joined, np.concatenate(labels), np.concatenate(indices)


def raw_pixels(images: UInt8[np.ndarray, "b s s 3"]) -> UInt8[np.ndarray, "b d"]:
  """Images as the plainest of features: at most PIXELS_SIDE on a side, flattened."""
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
  """Gives an untrained encoder the running averages of the images in `batches`, in place.

  Statistics must not see padding, so each batch is cut to what the devices and the encoder's own
  normalisation groups divide. Batches with masked rows are left out, unless there is nothing else.
  """
  graphdef, state = nnx.split(encoder)
  norms = (module for _, module in nnx.iter_modules(encoder) if isinstance(module, BatchNorm))
  divisor = math.lcm(mesh.size, *{norm.group or 1 for norm in norms})

  @functools.partial(jax.jit, donate_argnums=0)
  def one(state: nnx.State, image: Array) -> nnx.State:
    model = nnx.merge(graphdef, state)
    model(normalise(image), train=True)
    return nnx.state(model)

  state = jax.tree.map(jnp.copy, state)
  warm = False
  for batch in batches:
    image = batch["image"][batch["mask"]]
    image = image[: len(image) // divisor * divisor]
    if len(image) and (batch["mask"].all() or not warm):
      state = one(state, sharding.put_batch({"image": image}, mesh)["image"])
      warm = True
  nnx.update(encoder, state)


def _placed(batch: Batch, mesh: Mesh) -> Batch:
  """A batch on the mesh, padded with masked rows to a multiple of the devices."""
  short = -len(batch["mask"]) % mesh.size
  padded = {
    name: np.concatenate([value, np.zeros((short, *value.shape[1:]), value.dtype)])
    if short
    else value
    for name, value in batch.items()
  }
  return sharding.put_batch(padded, mesh)
