"""Evaluation over a whole set: padded and masked batches, features of frozen encoders, metrics.

With several processes each gives its block of every batch, as `loader.evaluation_batches` makes
them, and the results are those of one process: metrics on every process, features on those that
want them.
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
"""Larger images are averaged down to this side before their raw pixels count as features."""


def measure(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float | np.ndarray]:
  """The task's metrics over all batches, exact for any batch size, mesh and number of processes."""
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def one(state: nnx.State, batch: Batch) -> metrics.Collection:
    return task.evaluate(nnx.merge(graphdef, state), batch)

  total = None
  for batch in batches:
    current = one(state, _placed(batch, mesh))
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
  wanted: bool = True,
) -> tuple[dict[str, Float[np.ndarray, "n d"]], np.ndarray, np.ndarray]:
  """Representations of every image by several frozen encoders, and the images' raw pixels.

  Args:
    encoders: by name; called with `train=False`.
    normalise: uint8 images to what the encoders take.
    batches: with `image`, `label`, `mask`, `index`; each process's own rows of them.
    mesh: where the work runs.
    wanted: whether this process wants the results. Without, it does its share and returns arrays
      without rows.

  Returns:
    Features by encoder name, "pixels" (see `raw_pixels`) among them; labels; indices. In the order
    of the batches' rows, those of process 0 first in each batch.
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
  joined = _unmasked(functools.partial(encode, states), with_pixels, mesh, wanted)
  return joined, joined.pop("label"), joined.pop("index")


def predictions(
  task: Task, model: nnx.Module, batches: Iterable[Batch], mesh: Mesh, *, wanted: bool = True
) -> dict[str, np.ndarray]:
  """What `task.predict` says of every image, with `label` and `index`; see `features`."""
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def predict(state: nnx.State, batch: Batch) -> Batch:
    found = task.predict(nnx.merge(graphdef, state), batch)
    return found | {name: batch[name] for name in ("label", "index", "mask")}

  return _unmasked(functools.partial(predict, state), batches, mesh, wanted)


def _unmasked(
  function: Callable[[Batch], Batch], batches: Iterable[Batch], mesh: Mesh, wanted: bool
) -> dict[str, np.ndarray]:
  """The rows that a function returns for all batches, without masked ones; none unless wanted."""
  found: dict[str, list[np.ndarray]] = {}
  for batch in batches:
    for name, rows in function(_placed(batch, mesh)).items():
      # Each array is whole on every device; those of other processes are out of reach.
      found.setdefault(name, []).append(np.asarray(rows.addressable_data(0)))
    keep = found.pop("mask")[0] & wanted
    for rows in found.values():
      rows[-1] = rows[-1][keep]
  return {name: np.concatenate(rows) for name, rows in found.items()}


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

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding.replicated(mesh))
  def one(state: nnx.State, image: Array, rows: Array) -> nnx.State:
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
      state = one(state, placed["image"], rows)
      warm = True
  nnx.update(encoder, state)


def _placed(batch: Batch, mesh: Mesh) -> Batch:
  """A batch on the mesh, padded with masked rows to a multiple of this process's devices."""
  short = -len(batch["mask"]) % len(mesh.local_devices)
  padded = {
    name: np.concatenate([value, np.zeros((short, *value.shape[1:]), value.dtype)])
    if short
    else value
    for name, value in batch.items()
  }
  return sharding.put_batch(padded, mesh)
