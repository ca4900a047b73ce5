"""Loads a pretrained encoder from a workdir or a checkpoint; the data set is not needed."""

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
"""Defaults of the evaluation crop for a checkpoint whose config has none, by name of the field in
the config group `eval`."""


class PretrainedEncoder(nnx.Module):
  """A trained encoder, with the colour normalisation and the image size that it was trained with.

  Args:
    network: encoder, an NNX module that takes normalised images.
    config: config that the encoder was trained with, as values by dotted name.
    lineage: facts about the checkpoint: its folder as `path`, and its `step`.

  Attributes:
    network: encoder, an NNX module that takes normalised images.
    features: size d of the representation.
    size: side of the training views, in pixels.
    mean, std: mean and standard deviation of each colour channel, for pixels in [0, 1].
    crop: values of the config fields eval.resize, eval.crop_rule and eval.antialias, which `prepare`
      uses.
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
    """Computes the representations of images in float32, with BatchNorm's running averages.

    Args:
      images: uint8 [n, h, w, 3], RGB pixels 0..255. The images are not resized; `prepare` makes
        images of the training size from images of any size.

    Raises:
      ValueError: the images have another dtype or shape.
    """
    return self._run(_features, images)

  def stages(self, images: Array | np.ndarray) -> tuple[Float[Array, "n _ _ _"], ...]:
    """Computes the float32 feature maps of a ResNet's first layers and stages, for dense prediction.

    Args:
      images: uint8 [n, h, w, 3], RGB pixels 0..255, which are not resized.

    Returns:
      One feature map [n, height, width, channels] for the first layers, then one for each stage, in
      order.

    Raises:
      ValueError: the images have another dtype or shape.
    """
    return self._run(_stages, images)

  def prepare(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> UInt8[np.ndarray, "n size size 3"]:
    """Returns centre crops of images of any size, in the size that the encoder was trained with.

    The images are resized and cropped as in the evaluation of the encoder's run.

    Args:
      images: images uint8 [height, width, 3], RGB pixels 0..255.
    """
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
  """Loads an encoder from the newest undamaged checkpoint of a run; the data set is not needed.

  The checkpoint's config sets architecture, padding, epsilon, compute type, colour normalisation and
  image size.

    encoder = byolx.load_encoder("runs/quickstart")
    features = encoder(images)  # uint8 [n, h, w, 3] -> float32 [n, d]

  Args:
    path: workdir, its folder of checkpoints, or the folder of one checkpoint.
    encoder: name of the encoder, "online" or "target".
    mesh: mesh of devices, each of which will hold the whole encoder; None for the first device
      alone.
    network: function that makes the encoder, if the run was trained with the user's own encoder;
      None for the ResNet of the stored config.

  Raises:
    ConfigError: the checkpoint has no such encoder, no config is stored with it, or its arrays
      belong to another network.
    CheckpointError: there is no checkpoint, or all are damaged.
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
