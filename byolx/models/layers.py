"""Linear and convolution layers whose parameters know their role, initialised as the reference does."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.roles import Role

Initializer = Callable[..., Array]


def uncorrected(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
  """Normal values cut at two standard deviations, times 1/sqrt(fan_in).

  The cut shrinks the standard deviation to 0.88/sqrt(fan_in); the reference (haiku's default) does
  not correct for it, `nnx.initializers.lecun_normal` does.
  """
  fan_in = math.prod(shape[:-1])
  return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / math.sqrt(fan_in)


INITIALIZERS = {"uncorrected": uncorrected, "corrected": nnx.initializers.lecun_normal()}


def linear(
  inputs: int,
  outputs: int,
  *,
  rngs: nnx.Rngs,
  bias: bool = True,
  kernel_init: Initializer = uncorrected,
  dtype: DTypeLike = jnp.float32,
) -> nnx.Linear:
  """A linear layer: float32 parameters, computed in `dtype`."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    dtype=dtype,
    kernel_init=kernel_init,
    rngs=rngs,
    kernel_metadata={"role": Role.KERNEL},
    bias_metadata={"role": Role.BIAS},
  )


def conv(
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
) -> nnx.Conv:
  """A square convolution without bias (a normalisation follows each one).

  `padding="same"` is TensorFlow's rule: at stride 2 the odd pixel of padding goes to the right and
  bottom. `padding="torch"` pads both sides alike, so that torch's weights give torch's features.
  """
  return nnx.Conv(
    inputs,
    outputs,
    (kernel, kernel),
    strides=(stride, stride),
    kernel_dilation=(dilation, dilation),
    padding=window_padding(kernel, dilation, padding),
    use_bias=False,
    dtype=dtype,
    kernel_init=kernel_init,
    conv_general_dilated=_pointwise_as_product if kernel == 1 else jax.lax.conv_general_dilated,
    rngs=rngs,
    kernel_metadata={"role": Role.KERNEL},
  )


def window_padding(
  kernel: int, dilation: int, padding: str
) -> str | tuple[tuple[int, int], tuple[int, int]]:
  """Padding of a square window, in the form that `lax` takes (tuples: a GraphDef is hashed)."""
  if padding == "same":
    return "SAME"
  side = dilation * (kernel - 1) // 2
  return ((side, side), (side, side))


def _pointwise_as_product(
  x: Float[Array, "b h w c"], kernel: Float[Array, "1 1 c d"], strides: tuple[int, ...], *_, **__
) -> Float[Array, "b i j d"]:
  """A 1x1 convolution as a matrix product, which XLA's CPU backend differentiates 3x faster."""
  return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
