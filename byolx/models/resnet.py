"""Residual encoders f: ResNet v1, post-activation (appendix A, Architecture; Table 9).

The stride of a bottleneck sits on its 3x3 convolution, every group starts with a projection
shortcut, and a width multiplier scales every channel count.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.models.batch_norm import BatchNorm
from byolx.models.layers import Conv, Initializer, uncorrected, window_padding
from byolx.models.remat import BLOCK, STAGE


class Stem(NamedTuple):
  """First convolution: square kernel, stride, and whether a 3x3 stride-2 max pool follows."""

  kernel: int
  stride: int
  pool: bool


STEMS = {
  "imagenet": Stem(7, 2, True),
  "small": Stem(3, 1, False),
  "medium": Stem(5, 2, False),
}


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
  """Shape of one residual network.

  Args:
    blocks: residual blocks per stage.
    channels: output channels per stage.
    bottleneck: 1x1, 3x3, 1x1 blocks with a quarter of the channels inside; else two 3x3.
    strides: of each stage's first block; empty takes 1, 2, 2, ...
    stem: see STEMS.
    stem_channels: output channels of the first convolution.
    padding: "same" or "torch", see `layers.Conv`.
    dilation: of the last stage's 3x3 convolutions; above 1 its stride becomes 1 (appendix E.4).
    bn_decay, bn_eps, bn_group, bn_debias: see `BatchNorm`.
    bn_last_scale: initial gamma of each block's last normalisation; the paper's runs use 1.
    kernel_init: initialiser of every kernel.
    dtype: of activations and products; parameters, statistics and weight gradients stay float32.
    products: see `layers.Conv`.
  """

  blocks: tuple[int, ...]
  channels: tuple[int, ...]
  bottleneck: bool
  strides: tuple[int, ...] = ()
  stem: Stem = STEMS["imagenet"]
  stem_channels: int = 64
  padding: str = "same"
  dilation: int = 1
  bn_decay: float = 0.9
  bn_eps: float = 1e-5
  bn_group: int = 0
  bn_debias: bool = True
  bn_last_scale: float = 1.0
  kernel_init: Initializer = uncorrected
  dtype: DTypeLike = jnp.float32
  products: bool | None = None

  def norm(self, channels: int, scale_init: float = 1.0) -> BatchNorm:
    """A normalisation layer as this network has them."""
    return BatchNorm(
      channels,
      decay=self.bn_decay,
      eps=self.bn_eps,
      group=self.bn_group,
      debias=self.bn_debias,
      scale_init=scale_init,
      dtype=self.dtype,
    )

  def conv(self, inputs: int, outputs: int, kernel: int, *, rngs: nnx.Rngs, **options) -> Conv:
    """A convolution as this network has them."""
    return Conv(
      inputs,
      outputs,
      kernel,
      padding=self.padding,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      products=self.products,
      rngs=rngs,
      **options,
    )


_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
ARCHITECTURES = {
  "resnet18": ResNetSpec((2, 2, 2, 2), _BASIC, bottleneck=False),
  "resnet34": ResNetSpec((3, 4, 6, 3), _BASIC, bottleneck=False),
  "resnet50": ResNetSpec((3, 4, 6, 3), _BOTTLENECK, bottleneck=True),
  "resnet101": ResNetSpec((3, 4, 23, 3), _BOTTLENECK, bottleneck=True),
  "resnet152": ResNetSpec((3, 8, 36, 3), _BOTTLENECK, bottleneck=True),
  "resnet200": ResNetSpec((3, 24, 36, 3), _BOTTLENECK, bottleneck=True),
}


def widen(spec: ResNetSpec, width: float) -> ResNetSpec:
  """Multiplies every channel count by `width` (any positive number), to a multiple of 4 at least 4."""

  def scale(channels: int) -> int:
    return max(4, 4 * round(channels * width / 4))

  return dataclasses.replace(
    spec,
    channels=tuple(scale(c) for c in spec.channels),
    stem_channels=scale(spec.stem_channels),
  )


class Block(nnx.Module):
  """One residual block: convolutions, a shortcut, and a ReLU after their sum."""

  def __init__(
    self, spec: ResNetSpec, inputs: int, outputs: int, stride: int, dilation: int, first: bool, rngs
  ):
    inner = outputs // 4 if spec.bottleneck else outputs
    kernels = (1, 3, 1) if spec.bottleneck else (3, 3)
    strided = kernels.index(3)
    widths = (inputs, *(inner,) * (len(kernels) - 1), outputs)
    last = len(kernels) - 1
    self.convs = nnx.List(
      spec.conv(
        widths[i],
        widths[i + 1],
        kernel,
        stride=stride if i == strided else 1,
        dilation=dilation if kernel == 3 else 1,
        rngs=rngs,
      )
      for i, kernel in enumerate(kernels)
    )
    self.norms = nnx.List(
      spec.norm(widths[i + 1], spec.bn_last_scale if i == last else 1.0)
      for i in range(len(kernels))
    )
    self.shortcut = spec.conv(inputs, outputs, 1, stride=stride, rngs=rngs) if first else None
    self.shortcut_norm = spec.norm(outputs) if first else None

  def __call__(self, x: Float[Array, "b h w c"], *, train: bool, views: int) -> Array:
    skip = x
    if self.shortcut is not None:
      skip = self.shortcut_norm(self.shortcut(x), train=train, views=views)
    for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      x = norm(convolution(x), train=train, views=views)
      if i < len(self.convs) - 1:
        x = jax.nn.relu(x)
    return jax.nn.relu(x + skip)


class ResNet(nnx.Module):
  """The encoder: images to the mean-pooled features of the last stage."""

  def __init__(self, spec: ResNetSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.stem = spec.conv(
      3, spec.stem_channels, spec.stem.kernel, stride=spec.stem.stride, rngs=rngs
    )
    self.stem_norm = spec.norm(spec.stem_channels)
    stages, inputs = [], spec.stem_channels
    strides = spec.strides or (1, *(2,) * (len(spec.blocks) - 1))
    for count, outputs, stride in zip(spec.blocks, spec.channels, strides, strict=True):
      last = len(stages) == len(spec.blocks) - 1
      dilation = spec.dilation if last else 1
      blocks = []
      for index in range(count):
        first = index == 0
        step = stride if first and dilation == 1 else 1
        blocks.append(Block(spec, inputs, outputs, step, dilation, first, rngs=rngs))
        inputs = outputs
      stages.append(nnx.List(blocks))
    self.groups = nnx.List(stages)

  @property
  def features(self) -> int:
    """Size of the representation y."""
    return self.spec.channels[-1]

  def __call__(
    self, x: Float[Array, "b h w 3"], *, train: bool, views: int = 1
  ) -> Float[Array, "b d"]:
    """The representation y: the last stage averaged over space, in the compute type."""
    return jnp.mean(self.stages(x, train=train, views=views)[-1], axis=(1, 2))

  def stages(
    self, x: Float[Array, "b h w 3"], *, train: bool, views: int = 1
  ) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Feature maps: the stem's, then each stage's, for dense prediction.

    Args:
      x: normalised images; see `BatchNorm` for how several views are interleaved.
      train: normalise by this batch's statistics and record them.
      views: interleaved views.
    """
    x = jax.nn.relu(self.stem_norm(self.stem(x.astype(self.spec.dtype)), train=train, views=views))
    if self.spec.stem.pool:
      sides = (window_padding(3, 2, 1, self.spec.padding, size) for size in x.shape[1:3])
      padding = ((0, 0), *sides, (0, 0))
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
    maps = [checkpoint_name(checkpoint_name(x, BLOCK), STAGE)]
    for blocks in self.groups:
      x = maps[-1]
      for block in blocks:
        x = checkpoint_name(block(x, train=train, views=views), BLOCK)
      maps.append(checkpoint_name(x, STAGE))
    return tuple(maps)
