"""Loading of a pretrained encoder from a workdir or checkpoint, without its data set."""

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
from byolx.models.resnet import ResNet, ResNetSpec

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
    lineage: facts about the checkpoint: path, step, encoder, commit, fingerprint.
  """

  def __init__(self, network: nnx.Module, config: Mapping[str, Any], lineage: Mapping[str, Any]):
    self.network = network
    self.features = network.features
    self.size = int(config["views.size"])
    self.mean, self.std = tuple(config["views.mean"]), tuple(config["views.std"])
    self.crop = tuple(config.get(f"eval.{name}", default) for name, default in CROP.items())
    self.lineage = nnx.static(dict(lineage)) if hasattr(nnx, "static") else dict(lineage)

  def __call__(self, images: UInt8[Array | np.ndarray, "n h w 3"]) -> Float[Array, "n d"]:
    """Computes the representations of images, float32, with BatchNorm's running averages.

    Args:
      images: RGB images 0..255, which are not resized; `prepare` crops images of any size to `size`.

    Raises:
      ValueError: the images are not uint8 [n, h, w, 3].
    """
    return self._run(_features, images)

  def stages(
    self, images: UInt8[Array | np.ndarray, "n h w 3"]
  ) -> tuple[Float[Array, "n _ _ _"], ...]:
    """Computes the feature maps of the stem and of each stage, float32, for dense prediction."""
    return self._run(_stages, images)

  def prepare(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> UInt8[np.ndarray, "n size size 3"]:
    """Crops images of any size as in the evaluation of the encoder's run."""
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
  network: Callable[[nnx.Rngs], nnx.Module] | None = None,
) -> PretrainedEncoder:
  """Loads an encoder from the newest undamaged checkpoint of a run; its data set is not needed.

  The architecture, colour normalisation and image size come from the config in the checkpoint.

    encoder = byolx.load_encoder("runs/quickstart")
    features = encoder(images)  # uint8 [n, h, w, 3] -> float32 [n, d]

  Args:
    path: workdir, folder of checkpoints, or folder of one checkpoint.
    encoder: encoder to load, "online" or "target".
    mesh: devices that hold the encoder, each a whole copy; None for the first device.
    network: function that builds the encoder, for a run with the user's own encoder; None for the
      ResNet of the stored config.

  Raises:
    ConfigError: the checkpoint has no such encoder or no config, or its arrays do not fit the network.
    CheckpointError: there is no checkpoint, or no undamaged one.
  """
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if mesh is not None:
    place = sharding.replicated(mesh)
  loaded = pretrained.read(Path(path), encoder, place)
  config = flatten(loaded.config) or stored(path)
  if not config:
    raise ConfigError(f"{path}: expected a config in the checkpoint, or a config.json beside it")
  config = {f"views.{name}": x.default for name, x in fields_of(ViewsSpec).items()} | config
  if network is None:
    names = [name for name in fields_of(ResNetSpec) if f"model.{name}" in config]
    spec = ResNetSpec(**{name: config[f"model.{name}"] for name in names})
    network = functools.partial(_resnet, spec)
  module = nnx.eval_shape(lambda: network(nnx.Rngs(0)))
  graphdef, state = nnx.split(module)
  leaves = storage.named(state)
  kinds = {name: storage.kind(leaf) for name, leaf in leaves.items()}
  differing = [
    f"{name} is {storage.kind(loaded.arrays[name]) if name in loaded.arrays else 'missing'}, expected "
    f"{kinds.get(name, 'no such array')}"
    for name in kinds | loaded.arrays
    if name not in loaded.arrays or kinds.get(name) != storage.kind(loaded.arrays[name])
  ]
  if differing:
    raise ConfigError(f"{path}: the arrays do not fit the network: {first_few(differing)}")
  arrays = [loaded.arrays[name] for name in leaves]
  state = jax.tree.unflatten(jax.tree.structure(state), arrays)
  return PretrainedEncoder(nnx.merge(graphdef, state), config, loaded.lineage)


def _resnet(spec: ResNetSpec, rngs: nnx.Rngs) -> ResNet:
  return ResNet(spec, rngs=rngs)
