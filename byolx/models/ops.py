"""Convolutions and matrix products that compute in one type and return gradients in the weight's type.

With jax's own rules, the gradient of a weight that was cast to bfloat16 is rounded to bfloat16, and
is then summed over the devices of a mesh in bfloat16. Here the factors of a product have the
compute type, such as bfloat16, but the gradient of a float32 weight is float32, in each device's
product and in the sum over the devices.

The gradient of a convolution of stride s > 1 with respect to its input is computed in s phases per
axis. Phase a is the set of input pixels s*t + a. Their gradient depends only on every s-th tap of
the kernel, so it is a small dense convolution. The usual rule inserts zeros between the pixels of
the output's gradient, and so computes s^2 times as many products (docs/plan.md, "What each change
predicted and gave").
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from byolx.core import sharding

Pads = tuple[tuple[int, int], tuple[int, int]]
"""Padding of an image, in pixels: (before, after) for the height, then for the width."""

_NHWC = ("NHWC", "HWIO", "NHWC")
_FILTER = ("CHWN", "IHWO", "HWNC")  # sums over examples, so that the result has a kernel's shape


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
  x: Float[Array, "*b c"], kernel: Float[Array, "c d"], dtype: DTypeLike
) -> Float[Array, "*b d"]:
  """Computes x @ kernel in a given type, with a gradient of the kernel in the kernel's own type.

  Args:
    x: vectors along the last axis.
    kernel: matrix.
    dtype: type to which both factors are cast, and type of the result.
  """
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
  """Computes a two-dimensional convolution in a given type.

  The gradient of the kernel has the kernel's own type.

  Args:
    x: images with c channels.
    kernel: kernel of k x l taps, with c input and d output channels.
    stride: stride on both axes, at least 1.
    pads: numbers of zero pixels around the image, (before, after) for the height and the width.
    dilation: dilation of the kernel on both axes; must be 1 for a gradient at a stride above 1.
    dtype: type to which images and kernel are cast, and type of the result.

  Raises:
    ValueError: a gradient is computed with both stride and dilation above 1.
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
  """Casts a kernel to the compute type; if it is sharded, each device gets the whole of it."""
  return sharding.gathered(kernel.astype(dtype))


def _convolve(x: Array, kernel: Array, stride: int, pads: Pads, dilation: int) -> Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), pads, rhs_dilation=(dilation, dilation), dimension_numbers=_NHWC
  )


def _input_gradient(
  dy: Array, kernel: Array, size: tuple[int, ...], stride: int, pads: Pads, dilation: int
) -> Array:
  """Computes the gradient of a convolution with respect to its input.

  For a stride s > 1, it is computed in s phases. Phase a is the set of input pixels s t + a:

    dx[s t + a] = sum_j dy[t + (a + lo - b) / s - j] kernel[s j + b],

  with b = (a + lo) mod s, where lo is the padding before the image.

  Args:
    dy: gradient of the output.
    kernel: kernel of the convolution.
    size: height and width of the input.
    stride: stride of the convolution.
    pads: padding of the input, (before, after) for the height and the width.
    dilation: dilation of the kernel.
  """
  transposed = jnp.swapaxes(kernel, 2, 3)
  if stride == 1:
    reach = [dilation * (k - 1) for k in kernel.shape[:2]]
    around = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, pads, strict=True))
    return _convolve(dy, transposed[::-1, ::-1], 1, around, dilation)
  if dilation != 1:
    raise ValueError(f"stride={stride} with dilation={dilation}: expected one of them to be 1")
  rows, columns = (
    [
      _phase(a, size[i], kernel.shape[i], dy.shape[1 + i], stride, pads[i][0])
      for a in range(stride)
    ]
    for i in range(2)
  )
  # All phases get the length of the first one; the pixels beyond the image are cut off at the end.
  phases = [[_phase_gradient(dy, transposed, stride, row, column) for column in columns]
            for row in rows]  # fmt: skip
  dx = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
  b, h, _, w, _, c = dx.shape
  return dx.reshape(b, h * stride, w * stride, c)[:, : size[0], : size[1]]


def _phase(
  a: int, size: int, taps: int, outputs: int, stride: int, low: int
) -> tuple[int, int, int]:
  """Computes which kernel tap and which padding a strided convolution's input gradient needs.

  This is done for one phase of one axis. Phase a is the set of input pixels a, a + stride, ...

  Args:
    a: index of the phase, in 0 to stride - 1.
    size: size of the input on this axis.
    taps: size of the kernel on this axis.
    outputs: size of the output on this axis.
    stride: stride of the convolution.
    low: padding before the image on this axis.

  Returns:
    Three integers: the first kernel tap that the phase uses, and the numbers of pixels by which the
    output's gradient is padded before and after. A negative number means that pixels are removed.
  """
  first = (a + low) % stride
  count = len(range(first, taps, stride))
  before = count - 1 - (a + low - first) // stride
  length = -(-size // stride)
  return first, before, length - outputs + count - 1 - before


def _phase_gradient(
  dy: Array, transposed: Array, stride: int, row: tuple[int, int, int], column: tuple[int, int, int]
) -> Array:
  """Computes the gradient of a strided convolution for the input pixels of one phase on each axis.

  A phase of an axis is the set of every `stride`-th input pixel, from the phase's first one.

  Args:
    dy: gradient of the output.
    transposed: kernel with input and output channels exchanged.
    stride: stride of the convolution.
    row: phase of the height: first tap of the kernel, and padding of `dy` before and after.
    column: phase of the width, in the same form.
  """
  taps = transposed[row[0] :: stride, column[0] :: stride]
  if 0 in taps.shape:  # a kernel smaller than its stride skips the pixels of this phase
    b, h, w, _ = dy.shape
    lengths = (n + sum(pad[1:]) - k + 1 for n, pad, k in zip((h, w), (row, column), taps.shape))
    return jnp.zeros((b, *lengths, transposed.shape[3]), dy.dtype)
  return _convolve(dy, taps[::-1, ::-1], 1, (row[1:], column[1:]), 1)


def _kernel_gradient(
  x: Array, dy: Array, shape: tuple[int, ...], stride: int, pads: Pads, dilation: int, dtype
) -> Array:
  """Computes the gradient of a convolution with respect to its kernel.

    dkernel[i] = sum_n,o x[n, s o + dilation i - lo] dy[n, o], for each tap i,

  with the example n, the output pixel o, the stride s, and the padding lo before the image.

  Args:
    x: input images.
    dy: gradient of the output.
    shape: shape of the kernel.
    stride: stride s of the convolution.
    pads: padding of the images, (before, after) for the height and the width.
    dilation: dilation of the kernel.
    dtype: type of the gradient.
  """
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
