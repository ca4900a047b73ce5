"""A pretrained encoder in one line: from a workdir or a checkpoint, without the data set."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from byolx.checkpoints import pretrained, storage
from byolx.core import sharding
from byolx.core.config import ConfigError, flatten, stored
from byolx.core.fields import fields_of
from byolx.core.text import first_few
from byolx.data.augment.distribution import ViewsSpec
from byolx.data.augment.on_device import network_input
from byolx.data.augment.resizing import evaluation_view
from byolx.models import encoder as encoder_module
from byolx.models.encoder import Network
from byolx.models.resnet import ResNetSpec

CROP = {"resize": 256, "crop_rule": "paper", "antialias": False}
"""Evaluation crop, if the stored config has none: the fields of the group `eval`."""


class PretrainedEncoder(nnx.Module):
  """Encoder with the colour normalisation and the image size of its training.

  Args:
    network: encoder, an NNX module on normalised images.
    config: flat config of the encoder's run.
    lineage: facts about the checkpoint.

  Attributes:
    network: encoder, an NNX module on normalised images.
    features: size d of the representation.
    size: side of the training views, pixels.
    mean, std: mean and standard deviation of each channel, for pixels in [0, 1].
    crop: resize, crop_rule and antialias of the evaluation crop.
    checkpoint: folder of the checkpoint.
    step: training step of the checkpoint.
  """

  def __init__(self, network: nnx.Module, config: Mapping[str, Any], lineage: Mapping[str, Any]):
    self.network = network
    self.features = network.features
    self.size = int(config["views.size"])
    self.mean, self.std = tuple(config["views.mean"]), tuple(config["views.std"])
    self.crop = tuple(config.get(f"eval.{name}", default) for name, default in CROP.items())
    self.checkpoint, self.step = lineage["path"], lineage["step"]

  def __call__(self, images: Array | np.ndarray) -> Float[Array, "n d"]:
    """Representations of images, as evaluation uses them: running statistics, float32.

    Args:
      images: uint8 [n, h, w, 3], RGB pixels 0..255. Images of another size than `size` are encoded
        as they are; `prepare` makes that size of any image.

    Raises:
      ValueError: another dtype or shape.
    """
    return self._run(_features, images)

  def stages(self, images: Array | np.ndarray) -> tuple[Float[Array, "n _ _ _"], ...]:
    """Feature maps of the stem and of every stage, float32, for dense prediction.

    Args:
      images: uint8 [n, h, w, 3], see `__call__`.
    """
    return self._run(_stages, images)

  def prepare(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> UInt8[np.ndarray, "n size size 3"]:
    """The evaluation crops of images of any size, as the encoder's run evaluates them."""
    resize, rule, antialias = self.crop
    resize = max(resize, self.size)
    return np.stack([evaluation_view(x, self.size, resize, rule, antialias) for x in images])

  def _run(self, function: Callable, images: Any) -> Any:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(
        f"images are {storage.kind(images)}; expected uint8[n, height, width, 3], RGB pixels 0..255"
      )
    graphdef, state = nnx.split(self.network)
    return function(graphdef, self.mean, self.std, state, images)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(graphdef, mean, std, state, images):
  x = network_input(images, mean, std)
  return nnx.merge(graphdef, state)(x, train=False).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _stages(graphdef, mean, std, state, images):
  x = network_input(images, mean, std)
  maps = nnx.merge(graphdef, state).stages(x, train=False)
  return tuple(x.astype(jnp.float32) for x in maps)


def load_encoder(
  path: str | Path,
  encoder: str = "online",
  *,
  mesh: Mesh | None = None,
  network: Network | None = None,
) -> PretrainedEncoder:
  """Loads an encoder from the newest good checkpoint of a run; the data set need not be there.

  Architecture, padding, epsilon, compute type, colour normalisation and image size are those of the
  checkpoint.

    encoder = byolx.load_encoder("runs/quickstart")
    features = encoder(images)  # uint8 [n, h, w, 3] -> float32 [n, d]

  Args:
    path: workdir, its folder of checkpoints, or the folder of one checkpoint.
    encoder: "online" or "target".
    mesh: devices that hold the encoder, each all of it; None: the first device.
    network: function that makes the encoder of a run that was trained with the user's own; None:
      the ResNet of the stored config.

  Raises:
    ConfigError: there is no such encoder, or nothing says what network its arrays belong to.
    CheckpointError: there is no checkpoint, or none is good.
  """
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if mesh is not None:
    place = sharding.replicated(mesh)
  loaded = pretrained.read(Path(path), encoder, place)
  config = flatten(loaded.config) or stored(path)
  if not config:
    raise ConfigError(f"{path}: expected a config in the checkpoint, or a config.json beside it")
  config = {f"views.{name}": x.default for name, x in fields_of(ViewsSpec).items()} | config
  spec = ResNetSpec()
  if network is None:
    names = [name for name in fields_of(ResNetSpec) if f"model.{name}" in config]
    spec = ResNetSpec(**{name: config[f"model.{name}"] for name in names})
  module = nnx.eval_shape(lambda: encoder_module.build(spec, network, nnx.Rngs(0)))
  graphdef, state = nnx.split(module)
  leaves = storage.named(state)
  kinds = {name: storage.kind(leaf) for name, leaf in leaves.items()}
  differing = [
    f"{name} is {storage.kind(loaded.arrays[name]) if name in loaded.arrays else 'missing'} there, "
    f"{kinds.get(name, 'no such array')} here"
    for name in kinds | loaded.arrays
    if name not in loaded.arrays or kinds.get(name) != storage.kind(loaded.arrays[name])
  ]
  if differing:
    raise ConfigError(f"{path}: its encoder is another network: {first_few(differing)}")
  arrays = [loaded.arrays[name] for name in leaves]
  state = jax.tree.unflatten(jax.tree.structure(state), arrays)
  return PretrainedEncoder(nnx.merge(graphdef, state), config, loaded.lineage)
