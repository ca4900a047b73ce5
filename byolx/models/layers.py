"""Linear and convolution layers whose parameters know their role, initialised as the reference does."""

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
  """Normal values cut at two standard deviations, times 1/sqrt(fan_in).

  The cut shrinks the standard deviation to 0.88/sqrt(fan_in); the reference (haiku's default) does
  not correct for it, `nnx.initializers.lecun_normal` does.
  """
  fan_in = math.prod(shape[:-1])
  return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / math.sqrt(fan_in)


INITIALIZERS = {"uncorrected": uncorrected, "corrected": nnx.initializers.lecun_normal()}


class Linear(nnx.Module):
  """x @ kernel + bias: float32 parameters, computed in `dtype`."""

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
    # In float32, so that the bias's gradient is summed in it.
    return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(self.dtype)


class Conv(nnx.Module):
  """A square convolution without bias (a normalisation follows each one), computed in `dtype`.

  Args:
    inputs, outputs: channels.
    kernel: side.
    stride, dilation: of both axes.
    padding: "same" is TensorFlow's rule: at stride 2 the odd pixel of padding goes to the right and
      bottom. "torch" pads both sides alike, so that torch's weights give torch's features.
    kernel_init: initialiser of the float32 kernel.
    dtype: of products.
    products: compute a 1x1 kernel as a matrix product, which XLA differentiates three times faster
      on a CPU and slower on a TPU; None: where jax's default backend is a CPU.
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
      # The pixels that a strided 1x1 kernel leaves out are cut away first: so its gradient is dense.
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
  """Zeros before and after an axis of `size` pixels; see `Conv` for the rules."""
  reach = dilation * (kernel - 1) + 1
  if padding == "torch":
    return reach // 2, reach // 2
  total = max((-(-size // stride) - 1) * stride + reach - size, 0)
  return total // 2, total - total // 2
