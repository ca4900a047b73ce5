"""Convolutions against explicit sums, with both paddings; initial values; roles and types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.stats
from flax import nnx

from byolx.models import layers
from byolx.models.roles import Role


def numpy_init(key, shape, dtype=jnp.float32):
  """Normal values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def pads(size, kernel, stride, dilation, rule):
  """(before, after) along one axis: TensorFlow's rule, or torch's same number on both sides."""
  reach = dilation * (kernel - 1) + 1
  if rule == "torch":
    return reach // 2, reach // 2
  total = max((-(-size // stride) - 1) * stride + reach - size, 0)
  return total // 2, total - total // 2


def convolve(x, kernel, stride, dilation, rule):
  """Sums of products, by scipy, image by image and channel by channel."""
  spread = np.zeros((*(dilation * (k - 1) + 1 for k in kernel.shape[:2]), *kernel.shape[2:]))
  spread[::dilation, ::dilation] = kernel
  sides = [pads(size, kernel.shape[0], stride, dilation, rule) for size in x.shape[1:3]]
  x = np.pad(x.astype(np.float64), [(0, 0), *sides, (0, 0)])
  out = [
    [
      sum(
        scipy.signal.correlate2d(image[..., c], spread[..., c, d], mode="valid")
        for c in range(x.shape[-1])
      )[::stride, ::stride]
      for d in range(kernel.shape[3])
    ]
    for image in x
  ]
  return np.moveaxis(np.array(out), 1, -1)


@pytest.mark.parametrize("rule", ["same", "torch"])
@pytest.mark.parametrize(
  ("kernel", "stride", "dilation", "size"),
  [(3, 1, 1, (6, 7)), (3, 2, 1, (8, 7)), (7, 2, 1, (12, 9)), (3, 1, 2, (7, 8)), (1, 2, 1, (8, 7))],
)
def test_convolutions_are_sums_of_products(rule, kernel, stride, dilation, size):
  layer = layers.Conv(
    2, 3, kernel, stride=stride, dilation=dilation, padding=rule, kernel_init=numpy_init,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = np.random.default_rng(1).normal(size=(2, *size, 2)).astype(np.float32)
  expected = convolve(x, np.asarray(layer.kernel[...]), stride, dilation, rule)
  got = layer(jnp.asarray(x))
  assert got.shape == (2, *(-(-n // stride) for n in size), 3)
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_the_paddings_differ_at_stride_two_on_even_sizes():
  """About four points of accuracy were lost elsewhere by mixing them up."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 2)), jnp.float32)
  make = lambda rule: layers.Conv(  # noqa: E731
    2, 3, 3, stride=2, padding=rule, kernel_init=numpy_init, rngs=nnx.Rngs(0)
  )
  assert np.abs(make("same")(x) - make("torch")(x)).max() > 0.1
  odd = x[:, :7, :7]
  np.testing.assert_allclose(make("same")(odd), make("torch")(odd), atol=1e-5)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_product_is_laxs_convolution_and_so_is_its_gradient(stride, products):
  layer = layers.Conv(
    3, 5, 1, stride=stride, kernel_init=numpy_init, products=products, rngs=nnx.Rngs(0)
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
  graphdef, state = nnx.split(layer)

  def theirs(state, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, state["kernel"][...], (stride,) * 2, "SAME", dimension_numbers=numbers
    )

  def ours(state, x):
    return nnx.merge(graphdef, state)(x)

  @jax.jit
  def both(state, x):
    results = []
    for f in (ours, theirs):
      out, pull = jax.vjp(f, state, x)
      results.append(jax.tree.leaves((out, *pull(jnp.sin(out)))))
    return results

  for mine, expected in zip(*both(state, x), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("kernel", "stride", "dilation", "rule", "size", "expected"),
  [
    (7, 2, 1, "same", 224, (2, 3)),
    (7, 2, 1, "same", 225, (3, 3)),
    (7, 2, 1, "torch", 224, (3, 3)),
    (3, 1, 2, "torch", 14, (2, 2)),
    (3, 1, 2, "same", 14, (2, 2)),
    (1, 1, 1, "torch", 7, (0, 0)),
    (3, 2, 1, "same", 56, (0, 1)),
  ],
)
def test_window_padding(kernel, stride, dilation, rule, size, expected):
  assert layers.window_padding(kernel, stride, dilation, rule, size) == expected


def test_initial_values_are_cut_and_not_corrected_for_it():
  shape = (3, 3, 64, 32)
  fan_in = 3 * 3 * 64
  drawn = {
    name: np.asarray(init(jax.random.key(0), shape, jnp.float32))
    for name, init in layers.INITIALIZERS.items()
  }
  cut = scipy.stats.truncnorm(-2, 2).std()  # 0.8796: a correction makes values 13.7 % larger
  std = {name: values.std() * np.sqrt(fan_in) for name, values in drawn.items()}
  assert std["uncorrected"] == pytest.approx(cut, rel=0.02)
  assert std["corrected"] == pytest.approx(1.0, rel=0.02)
  assert std["corrected"] / std["uncorrected"] == pytest.approx(1.137, rel=0.01)
  bounds = {"uncorrected": 2.0, "corrected": 2.0 / cut}
  for name, values in drawn.items():
    assert abs(values.mean()) * np.sqrt(fan_in) < 0.03
    largest = np.abs(values).max() * np.sqrt(fan_in)
    assert 0.98 * bounds[name] < largest <= bounds[name] * (1 + 1e-5)


def test_linear_fan_in_is_the_number_of_inputs():
  values = layers.uncorrected(jax.random.key(1), (256, 64))
  expected = scipy.stats.truncnorm(-2, 2).std() / 16
  assert float(jnp.std(values)) == pytest.approx(expected, rel=0.03)


def test_parameters_say_their_role_and_stay_float32():
  rngs, half = nnx.Rngs(0), jnp.bfloat16
  conv = layers.Conv(2, 4, 3, kernel_init=numpy_init, dtype=half, rngs=rngs)
  linear = layers.Linear(4, 3, kernel_init=numpy_init, dtype=half, rngs=rngs)
  assert conv.kernel.get_metadata()["role"] is Role.KERNEL
  assert linear.kernel.get_metadata()["role"] is Role.KERNEL
  assert linear.bias.get_metadata()["role"] is Role.BIAS
  assert layers.Linear(4, 3, bias=False, kernel_init=numpy_init, rngs=rngs).bias is None
  assert {p.dtype for p in (conv.kernel, linear.kernel, linear.bias)} == {jnp.dtype(jnp.float32)}
  assert conv(jnp.ones((1, 4, 4, 2))).dtype == half
  assert linear(jnp.ones((1, 4))).dtype == half
  np.testing.assert_array_equal(linear.bias[...], 0)
