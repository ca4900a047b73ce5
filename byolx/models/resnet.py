"""Residual encoders f: ResNet v1, post-activation (appendix A, Architecture; Table 9).

The stride of a bottleneck block is that of its 3x3 convolution. Each stage starts with a block that
has a projection shortcut, a 1x1 convolution. A width multiplier scales all numbers of channels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.core.fields import above, at_least, between, each, field, one_of, whole
from byolx.models.batch_norm import BatchNorm
from byolx.models.layers import INITIALIZERS, Conv, Initializer, window_padding
from byolx.models.remat import BLOCK, STAGE


class Stem(NamedTuple):
  """First layers of a ResNet, called the stem.

  Attributes:
    kernel: side of the first convolution's kernel, in pixels.
    stride: stride of the first convolution.
    pool: whether a 3x3 max pool of stride 2 follows the first convolution.
  """

  kernel: int
  stride: int
  pool: bool


STEMS = {
  "imagenet": Stem(7, 2, True),
  "small": Stem(3, 1, False),
  "medium": Stem(5, 2, False),
}


class Stages(NamedTuple):
  """Stages of a ResNet, each a sequence of residual blocks with equally many output channels.

  Attributes:
    blocks: number of residual blocks of each stage.
    channels: number of output channels of each stage.
    bottleneck: whether a block has 1x1, 3x3 and 1x1 convolutions; if False, it has two 3x3
      convolutions.
  """

  blocks: tuple[int, ...]
  channels: tuple[int, ...]
  bottleneck: bool


_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
ARCHITECTURES = {
  "resnet18": Stages((2, 2, 2, 2), _BASIC, bottleneck=False),
  "resnet34": Stages((3, 4, 6, 3), _BASIC, bottleneck=False),
  "resnet50": Stages((3, 4, 6, 3), _BOTTLENECK, bottleneck=True),
  "resnet101": Stages((3, 4, 23, 3), _BOTTLENECK, bottleneck=True),
  "resnet152": Stages((3, 8, 36, 3), _BOTTLENECK, bottleneck=True),
  "resnet200": Stages((3, 24, 36, 3), _BOTTLENECK, bottleneck=True),
}


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
  """The config group `model`: specification of a ResNet.

  The inner convolutions of a bottleneck block have a quarter of the block's output channels. With a
  `dilation` above 1, the stride of the last stage is 1 (appendix E.4). Parameters, statistics and
  gradients of weights are float32 for any `dtype`. `byolx fields` explains the attributes that are
  not listed here.

  Args:
    kernel_init: initialiser of kernels, or its name in the config.
    dtype: compute type, or its name in the config.
    products: whether 1x1 convolutions are computed as matrix products; None to do so if jax's
      default backend is a CPU. Not a config field.

  Raises:
    ValueError: for `arch` "custom", `blocks`, `channels` or `strides` does not have one number per
      stage (`strides` may be empty). For any other `arch`, one of these three fields is not empty.
  """

  arch: str = field(
    "resnet50",
    "architecture of the encoder; custom: by model.blocks, model.channels, model.strides, "
    "model.bottleneck",
    one_of(*ARCHITECTURES, "custom"),
    encoder=True,
  )
  width: float = field(
    1.0, "factor of all numbers of channels, rounded to multiples of 4", above(0), encoder=True
  )
  blocks: tuple[int, ...] = field(
    (), "arch=custom: number of residual blocks of each stage", each(whole(1)), encoder=True
  )
  channels: tuple[int, ...] = field(
    (), "arch=custom: output channels of each stage, before width", each(whole(1)), encoder=True
  )
  strides: tuple[int, ...] = field(
    (), "arch=custom: stride of each stage; empty: 1, 2, 2, ...", each(at_least(1)), encoder=True
  )
  bottleneck: bool = field(
    False,
    "arch=custom: blocks of 1x1, 3x3, 1x1 convolutions, instead of two 3x3 convolutions",
    encoder=True,
  )
  stem: str = field(
    "imagenet",
    "first layers: imagenet, 7x7 convolution of stride 2 and max pool; small, 3x3 of stride 1; medium, "
    "5x5 of stride 2",
    one_of(*STEMS),
    encoder=True,
  )
  stem_channels: int = field(
    64, "output channels of the first convolution, before width", at_least(1), encoder=True
  )
  padding: str = field(
    "same",
    "padding of convolutions: TensorFlow's rule, or torch's, for weights trained with torch",
    one_of("same", "torch"),
    encoder=True,
  )
  dilation: int = field(
    1,
    "dilation of the last stage's 3x3 convolutions; above 1, the stage has stride 1",
    at_least(1),
    encoder=True,
  )
  bn_decay: float = field(
    0.9, "decay rate of BatchNorm's running averages", between(0, 1), encoder=True
  )
  bn_eps: float = field(1e-5, "epsilon added to BatchNorm's variances", above(0), encoder=True)
  bn_group: int = field(
    0,
    "images over which BatchNorm computes its statistics; 0: all of the batch or micro-batch",
    at_least(0),
  )
  bn_debias: bool = field(
    True, "zero-debiasing of BatchNorm's running averages, as in the authors' code", encoder=True
  )
  bn_last_scale: float = field(
    1.0, "initial scale gamma of the last normalisation of each block", at_least(0)
  )
  kernel_init: str | Initializer = field(
    "uncorrected",
    "initial kernels, truncated normal: uncorrected, as in the authors' code; corrected to variance "
    "1 / inputs",
    one_of(*INITIALIZERS),
  )
  dtype: DTypeLike = field(
    "float32",
    "type of computations; parameters and statistics are float32",
    one_of("float32", "bfloat16"),
    encoder=True,
  )
  products: bool | None = None

  def __post_init__(self):
    stages = {name: getattr(self, name) for name in ("blocks", "channels", "strides")}
    if self.arch != "custom":
      if any(stages.values()):
        text = ", ".join(f"model.{name}={values}" for name, values in stages.items() if values)
        raise ValueError(f"{text}: only for model.arch=custom; model.arch is {self.arch}")
      return
    lengths = {len(values) for name, values in stages.items() if values or name != "strides"}
    if len(lengths) != 1 or 0 in lengths:
      text = ", ".join(f"model.{name}={values}" for name, values in stages.items())
      raise ValueError(f"model.arch=custom with {text}: expected one number per stage in each")

  @property
  def stages(self) -> Stages:
    """Numbers of blocks and of output channels of each stage, with channels multiplied by `width`."""
    custom = Stages(self.blocks, self.channels, self.bottleneck)
    stages = ARCHITECTURES.get(self.arch, custom)
    return stages._replace(channels=tuple(self._widen(size) for size in stages.channels))

  @property
  def stage_strides(self) -> tuple[int, ...]:
    """Stride of each stage's first block; the last one is not used if `dilation` is above 1."""
    return self.strides or (1, *(2,) * (len(self.stages.blocks) - 1))

  @property
  def stem_width(self) -> int:
    """Number of output channels of the first convolution, with `width` applied."""
    return self._widen(self.stem_channels)

  @property
  def initializer(self) -> Initializer:
    """Initialiser of all kernels, as a function."""
    return INITIALIZERS[self.kernel_init] if isinstance(self.kernel_init, str) else self.kernel_init

  def _widen(self, channels: int) -> int:
    """Multiplies a number of channels by `width`, and rounds to a multiple of 4 that is at least 4."""
    return max(4, 4 * round(channels * self.width / 4))

  def norm(self, channels: int, scale_init: float = 1.0) -> BatchNorm:
    """Builds a batch normalisation with the settings of this specification.

    Args:
      channels: number of channels.
      scale_init: initial value of the scale gamma.
    """
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
    """Builds a convolution with the settings of this specification.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      kernel: side of the kernel, in pixels.
      rngs: random key of the kernel.
      **options: other arguments of `layers.Conv`, such as `stride`.
    """
    return Conv(
      inputs,
      outputs,
      kernel,
      padding=self.padding,
      kernel_init=self.initializer,
      dtype=self.dtype,
      products=self.products,
      rngs=rngs,
      **options,
    )


class Block(nnx.Module):
  """Residual block: convolutions, a shortcut, and a ReLU after their sum.

  Args:
    spec: specification of the ResNet.
    inputs: number of input channels.
    outputs: number of output channels.
    stride: stride of the first 3x3 convolution, and of the shortcut.
    dilation: dilation of the 3x3 convolutions.
    first: whether the block is the first of its stage; its shortcut is then a 1x1 convolution, else
      the input itself.
    rngs: random keys of the kernels.
  """

  def __init__(
    self, spec: ResNetSpec, inputs: int, outputs: int, stride: int, dilation: int, first: bool, rngs
  ):
    bottleneck = spec.stages.bottleneck
    inner = outputs // 4 if bottleneck else outputs
    kernels = (1, 3, 1) if bottleneck else (3, 3)
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
  """Encoder f: computes the representation y of an image, the mean over the last stage's pixels.

  Args:
    spec: specification of the ResNet.
    rngs: random keys of the kernels.
  """

  def __init__(self, spec: ResNetSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    stem, sizes, inputs = STEMS[spec.stem], spec.stages, spec.stem_width
    self.stem = spec.conv(3, inputs, stem.kernel, stride=stem.stride, rngs=rngs)
    self.stem_norm = spec.norm(inputs)
    stages = []
    for count, outputs, stride in zip(
      sizes.blocks, sizes.channels, spec.stage_strides, strict=True
    ):
      last = len(stages) == len(sizes.blocks) - 1
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
    """Size d of the representation y."""
    return self.spec.stages.channels[-1]

  def __call__(
    self, x: Float[Array, "b h w 3"], *, train: bool, views: int = 1
  ) -> Float[Array, "b d"]:
    """Computes the representation y [b, d] of each image, in the compute type.

    Args:
      x: normalised images; row b * views + v of the batch is view v of image b.
      train: whether BatchNorm uses the statistics of this batch and updates the running averages.
        If False, it uses the running averages.
      views: number of views per image in the batch.
    """
    return jnp.mean(self.stages(x, train=train, views=views)[-1], axis=(1, 2))

  def stages(
    self, x: Float[Array, "b h w 3"], *, train: bool, views: int = 1
  ) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Computes the feature maps of the stem (the first layers) and of each stage, for dense prediction.

    Args:
      x: normalised images; row b * views + v of the batch is view v of image b.
      train: whether BatchNorm uses the statistics of this batch and updates the running averages.
        If False, it uses the running averages.
      views: number of views per image in the batch.

    Returns:
      One feature map [b, height, width, channels] for the stem, then one for each stage, in order.
    """
    x = jax.nn.relu(self.stem_norm(self.stem(x.astype(self.spec.dtype)), train=train, views=views))
    if STEMS[self.spec.stem].pool:
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
