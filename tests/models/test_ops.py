"""Products whose weight gradients are float32: values and gradients against jax's own rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byolx.models import ops
from byolx.models.layers import window_padding


def drawn(*shapes, dtype=jnp.float32):
  generator = np.random.default_rng(len(shapes))
  return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def plain(x, kernel, stride, pads, dilation):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride,) * 2,
    pads,
    rhs_dilation=(dilation,) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.mark.parametrize("rule", ["same", "torch"])
@pytest.mark.parametrize(
  ("taps", "stride", "dilation", "size"),
  [
    (3, 1, 1, (6, 7)),
    (3, 2, 1, (8, 8)),
    (3, 2, 1, (7, 10)),
    (7, 2, 1, (12, 9)),
    (5, 2, 1, (5, 4)),
    (3, 3, 1, (9, 10)),
    (3, 4, 1, (9, 8)),
    (3, 1, 2, (7, 8)),
    (2, 3, 1, (8, 9)),
  ],
)
def test_a_convolution_and_its_gradients_are_jaxs(rule, taps, stride, dilation, size):
  x, kernel = drawn((2, *size, 3), (taps, taps, 3, 5))
  pads = tuple(window_padding(taps, stride, dilation, rule, n) for n in size)

  @jax.jit
  def both(x, kernel):
    results = []
    ours = functools.partial(
      ops.convolve,
      stride=stride, pads=pads, dilation=dilation, dtype=jnp.dtype("float32"),
    )  # fmt: skip
    theirs = functools.partial(plain, stride=stride, pads=pads, dilation=dilation)
    for f in (ours, theirs):
      out, pull = jax.vjp(f, x, kernel)
      results.append((out, *pull(jnp.sin(out))))
    return results

  for mine, expected in zip(*both(x, kernel), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=2e-5)


def test_a_strided_and_dilated_convolution_has_no_input_gradient():
  x, kernel = drawn((1, 8, 8, 1), (3, 3, 1, 1))
  with pytest.raises(ValueError, match="stride=2 with dilation=2: expected one of them to be 1"):
    jax.grad(lambda x: ops.convolve(x, kernel, 2, ((2, 2), (2, 2)), 2, jnp.float32).sum())(x)


@pytest.mark.parametrize("operation", ["convolve", "matmul"])
def test_gradients_of_weights_are_float32_sums_under_bfloat16(operation):
  """4097 products of 1: their sum has one digit more than bfloat16 holds."""
  kernel = jnp.ones((1, 1, 1, 1))
  if operation == "matmul":
    x = jnp.ones((4097, 1), jnp.bfloat16)
    f = lambda x, w: ops.matmul(x, w[0, 0], jnp.bfloat16)  # noqa: E731
  else:
    x = jnp.ones((1, 17, 241, 1), jnp.bfloat16)
    f = lambda x, w: ops.convolve(x, w, 1, ((0, 0), (0, 0)), 1, jnp.bfloat16)  # noqa: E731
  out, pull = jax.vjp(f, x, kernel)
  dx, dkernel = pull(jnp.ones_like(out))
  assert (out.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  assert float(dkernel.reshape(())) == 4097.0
  assert float(jnp.asarray(4097.0, jnp.bfloat16)) == 4096.0


def test_matmul_and_its_gradients_are_numpys():
  x, kernel, dy = drawn((2, 3, 4, 5), (5, 6), (2, 3, 4, 6))
  out, pull = jax.vjp(lambda x, w: ops.matmul(x, w, jnp.float32), x, kernel)
  dx, dkernel = pull(dy)
  x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
  np.testing.assert_allclose(out, x @ kernel, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dkernel, np.einsum("bijc,bijd->cd", x, dy), rtol=1e-5, atol=1e-5)
