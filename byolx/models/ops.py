"""Convolutions and matrix products that compute in one type and give weight gradients in float32.

jax's own rules give the gradient of a weight that was cast to bfloat16 in bfloat16, and then the sum
over the devices of a mesh is taken in bfloat16 too. Here products are taken in the compute type, but
the gradient of a weight leaves the matrix unit as the float32 sum that it is, and is summed over
devices as that.

The input's gradient of a strided convolution is computed phase by phase: pixels s*t + a of the input
meet only every s-th tap of the kernel, so that each phase is a small dense convolution. The usual way
spreads the output's gradient with zeros, and multiplies them: s^2 times the work, which was 8 % of a
ResNet-50 4x step by the TPU compiler's schedule.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.core import sharding

Pads = tuple[tuple[int, int], tuple[int, int]]
"""Pixels before and after, for height and width."""

_NHWC = ("NHWC", "HWIO", "NHWC")
_FILTER = ("CHWN", "IHWO", "HWNC")  # contracts over examples; a kernel comes out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
  x: Float[Array, "*b c"], kernel: Float[Array, "c d"], dtype: DTypeLike
) -> Float[Array, "*b d"]:
  """x @ kernel, in `dtype`; the kernel's gradient in the kernel's own type."""
  return x.astype(dtype) @ _cast(kernel, dtype)


def _matmul_forward(x, kernel, dtype):
  cast = _cast(kernel, dtype)
  return x.astype(dtype) @ cast, (x, cast, jnp.zeros((), kernel.dtype))


def _matmul_backward(dtype, residuals, dy):
  x, kernel, like = residuals
  axes = tuple(range(x.ndim - 1))

  def dkernel(x: Array, dy: Array) -> Array:
    return jax.lax.dot_general(x, dy, ((axes, axes), ((), ())), preferred_element_type=like.dtype)

  return (dy @ kernel.T).astype(x.dtype), sharding.summed(
    dkernel, kernel.shape, x.astype(dtype), dy
  )


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "k l c d"],
  stride: int,
  pads: Pads,
  dilation: int,
  dtype: DTypeLike,
) -> Float[Array, "b i j d"]:
  """A convolution in `dtype`; the kernel's gradient in the kernel's own type.

  Args:
    x: images.
    kernel: one for all channels.
    stride: of both axes.
    pads: zeros around the image.
    dilation: of the kernel; 1 where the stride is above 1.
    dtype: of both factors and of the result.
  """
  return _convolve(x.astype(dtype), _cast(kernel, dtype), stride, pads, dilation)


def _convolve_forward(x, kernel, stride, pads, dilation, dtype):
  cast = _cast(kernel, dtype)
  y = _convolve(x.astype(dtype), cast, stride, pads, dilation)
  return y, (x, cast, jnp.zeros((), kernel.dtype))


def _convolve_backward(stride, pads, dilation, dtype, residuals, dy):
  x, kernel, like = residuals
  dx = _input_gradient(dy, kernel, x.shape[1:3], stride, pads, dilation)

  def dkernel(x: Array, dy: Array) -> Array:
    return _kernel_gradient(x, dy, kernel.shape, stride, pads, dilation, like.dtype)

  return dx.astype(x.dtype), sharding.summed(dkernel, kernel.shape, x.astype(dtype), dy)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _cast(kernel: Array, dtype: DTypeLike) -> Array:
  """The kernel in the compute type, gathered where the mesh keeps it in pieces."""
  return sharding.gathered(kernel.astype(dtype))


def _convolve(x: Array, kernel: Array, stride: int, pads: Pads, dilation: int) -> Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), pads, rhs_dilation=(dilation, dilation), dimension_numbers=_NHWC
  )


def _input_gradient(
  dy: Array, kernel: Array, size: tuple[int, ...], stride: int, pads: Pads, dilation: int
) -> Array:
  """dx[s t + a] = sum_j dy[t + (a + lo - b) / s - j] kernel[s j + b], where b = (a + lo) mod s."""
  turned = jnp.swapaxes(kernel, 2, 3)
  if stride == 1:
    reach = [dilation * (k - 1) for k in kernel.shape[:2]]
    around = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, pads, strict=True))
    return _convolve(dy, turned[::-1, ::-1], 1, around, dilation)
  if dilation != 1:
    raise ValueError(f"stride={stride} with dilation={dilation}: expected one of them to be 1")
  rows, columns = (
    [
      _phase(a, size[i], kernel.shape[i], dy.shape[1 + i], stride, pads[i][0])
      for a in range(stride)
    ]
    for i in range(2)
  )
  # Every phase as long as the first one; what is too much is cut off at the end.
  parts = [[_of_phases(dy, turned, stride, row, column) for column in columns] for row in rows]
  dx = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
  b, h, _, w, _, c = dx.shape
  return dx.reshape(b, h * stride, w * stride, c)[:, : size[0], : size[1]]


def _phase(
  a: int, size: int, taps: int, outputs: int, stride: int, low: int
) -> tuple[int, int, int]:
  """First tap, and padding before and after, of the input pixels a, a + stride, ... of one axis."""
  first = (a + low) % stride
  count = len(range(first, taps, stride))
  before = count - 1 - (a + low - first) // stride
  length = -(-size // stride)
  return first, before, length - outputs + count - 1 - before


def _of_phases(
  dy: Array, turned: Array, stride: int, row: tuple[int, int, int], column: tuple[int, int, int]
) -> Array:
  some = turned[row[0] :: stride, column[0] :: stride]
  if 0 in some.shape:  # a kernel shorter than its stride leaves pixels out
    b, h, w, _ = dy.shape
    lengths = (n + sum(pad[1:]) - k + 1 for n, pad, k in zip((h, w), (row, column), some.shape))
    return jnp.zeros((b, *lengths, turned.shape[3]), dy.dtype)
  return _convolve(dy, some[::-1, ::-1], 1, (row[1:], column[1:]), 1)


def _kernel_gradient(
  x: Array, dy: Array, shape: tuple[int, ...], stride: int, pads: Pads, dilation: int, dtype
) -> Array:
  """sum_n x[n, s o + dilation i - lo] dy[n, o], for each tap i: a convolution over examples."""
  around = tuple(
    (low, dilation * (taps - 1) + (outputs - 1) * stride + 1 - size - low)
    for taps, size, outputs, (low, _) in zip(
      shape[:2], x.shape[1:3], dy.shape[1:3], pads, strict=True
    )
  )
  return jax.lax.conv_general_dilated(
    x,
    dy,
    (dilation, dilation),
    around,
    rhs_dilation=(stride, stride),
    dimension_numbers=_FILTER,
    preferred_element_type=dtype,
  )
