"""Linear and convolution layers, with a role for each parameter and the reference's initialiser."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.models import ops
from byolx.models.remat import CONVOLUTION
from byolx.models.roles import Role

Initializer = Callable[..., Array]


def uncorrected(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
  """Returns an initial kernel: a normal distribution, truncated and multiplied by 1/sqrt(fan_in).

  The normal distribution is truncated at two standard deviations. Truncation reduces the standard
  deviation to 0.88/sqrt(fan_in). The reference (haiku's default) does not correct this, and neither
  does this function; `nnx.initializers.lecun_normal` does (docs/fidelity.md, `model.kernel_init`).

  Args:
    key: random key.
    shape: shape of the kernel, with the output channels last.
    dtype: type of the values.
  """
  fan_in = math.prod(shape[:-1])
  return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / math.sqrt(fan_in)


INITIALIZERS = {"uncorrected": uncorrected, "corrected": nnx.initializers.lecun_normal()}


class Linear(nnx.Module):
  """Linear layer, x @ kernel + bias, with float32 parameters.

  Args:
    inputs: size of the input vectors.
    outputs: size of the output vectors.
    rngs: random key of the kernel.
    bias: whether the layer has a bias, which starts at 0.
    kernel_init: initialiser of the kernel.
    dtype: type of the products and of the output.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    kernel_init: Initializer = uncorrected,
    dtype: DTypeLike = jnp.float32,
  ):
    self.kernel = nnx.Param(
      kernel_init(rngs.params(), (inputs, outputs), jnp.float32), role=Role.KERNEL
    )
    self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), role=Role.BIAS) if bias else None
    self.dtype = dtype

  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    y = checkpoint_name(ops.matmul(x, self.kernel[...], self.dtype), CONVOLUTION)
    # In float32, so that the gradient of the bias is summed in float32.
    return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(self.dtype)


class Conv(nnx.Module):
  """Convolution with a square kernel; it has no bias, because a normalisation follows.

  Args:
    inputs: number of input channels.
    outputs: number of output channels.
    kernel: size of the kernel on each axis, in pixels.
    rngs: random key of the kernel.
    stride: stride on both axes.
    dilation: dilation on both axes.
    padding: name of the padding rule. "same" is TensorFlow's rule, which puts an odd pixel of
      padding at the right and bottom. "torch" pads all sides equally, for weights that were trained
      with torch.
    kernel_init: initialiser of the float32 kernel.
    dtype: type of the products and of the output.
    products: whether a convolution with a 1x1 kernel is computed as a matrix product, which is
      faster on a CPU but slower on a TPU (docs/plan.md); None to do so if jax's default backend is
      a CPU.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    rngs: nnx.Rngs,
    stride: int = 1,
    dilation: int = 1,
    padding: str = "same",
    kernel_init: Initializer = uncorrected,
    dtype: DTypeLike = jnp.float32,
    products: bool | None = None,
  ):
    shape = (kernel, kernel, inputs, outputs)
    self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32), role=Role.KERNEL)
    self.stride = stride
    self.dilation = dilation
    self.padding = padding
    self.dtype = dtype
    self.products = products

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
    kernel, stride = self.kernel[...], self.stride
    if kernel.shape[0] == 1:
      # A strided 1x1 kernel skips pixels. Without them, its gradient is a dense product.
      x, stride = x[:, ::stride, ::stride], 1
      if self.products or (self.products is None and jax.default_backend() == "cpu"):
        y = ops.matmul(x, kernel[0, 0], self.dtype)
        return checkpoint_name(y, CONVOLUTION)
    pads = tuple(
      window_padding(kernel.shape[0], stride, self.dilation, self.padding, size)
      for size in x.shape[1:3]
    )
    y = ops.convolve(x, kernel, stride, pads, self.dilation, self.dtype)
    return checkpoint_name(y, CONVOLUTION)


def window_padding(
  kernel: int, stride: int, dilation: int, padding: str, size: int
) -> tuple[int, int]:
  """Returns the numbers of padding pixels before and after an image on one axis.

  Args:
    kernel: size of the window on this axis, in pixels.
    stride: stride of the window.
    dilation: dilation of the window.
    padding: name of the padding rule: "same", TensorFlow's, or "torch", equal on both sides.
    size: size of the image on this axis, in pixels.
  """
  reach = dilation * (kernel - 1) + 1
  if padding == "torch":
    return reach // 2, reach // 2
  total = max((-(-size // stride) - 1) * stride + reach - size, 0)
  return total // 2, total - total // 2
