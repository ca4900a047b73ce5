"""The device's colour work against the host's, operation by operation and in every order; on eight
devices; and with the matrix products of a TPU. `test_augment_device_views` has whole views."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_sample_images

from byolx.data.augment import on_device as device
from byolx.data.augment import on_host as host
from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.on_device import apply_device
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.resizing import crop_and_resize

T = ViewSpec()
STRONG = ViewSpec(
  brightness=0.8, contrast=1.0, saturation=1.0, hue=0.5, jitter_probability=1.0,
  grayscale_probability=0.2, blur_probability=0.5, solarise_probability=0.3,
)  # fmt: skip
LEVEL = 1 / 255
ROUNDING = 0.5 * LEVEL  # of a host view, which is uint8


@pytest.fixture(scope="module")
def photographs():
  return [np.ascontiguousarray(image) for image in load_sample_images().images]


def drawn(spec, photographs, n, size=224, seed=0):
  """n views cut from the photographs, and their draws, batched."""
  rng = np.random.default_rng(seed)
  images = [photographs[i % len(photographs)] for i in range(n)]
  draws = [draw(spec, rng, *image.shape[:2]) for image in images]
  views = [crop_and_resize(im, d.crop, size, False) for im, d in zip(images, draws, strict=True)]
  return np.stack(views), Draws(*map(np.stack, zip(*draws)))


def row(draws, i):
  return Draws(*(field[i] for field in draws))


def by_host(views, draws, rule="additive"):
  return np.stack([apply_host(view, row(draws, i), rule) for i, view in enumerate(views)])


apply_jitted = jax.jit(apply_device, static_argnames="brightness_rule")


def by_device(views, draws, rule="additive"):
  return np.asarray(apply_jitted(views, draws, brightness_rule=rule))


# ------------------------------------------------------------------------------------------------
# The same views as the host's
# ------------------------------------------------------------------------------------------------


HUE_AMOUNTS = (-0.5, -0.3, -0.1, 0.0, 1e-7, 0.1, 1 / 6, 0.5)
OPERATIONS = {
  "brightness": (device.brightness, host.brightness, (-0.4, 0.0, 0.4)),
  "contrast": (device.contrast, host.contrast, (0.0, 0.6, 1.0, 1.4)),
  "saturation": (device.saturation, host.saturation, (0.0, 0.8, 1.0, 1.2, 2.0)),
  "hue": (device.hue, host.hue, HUE_AMOUNTS),
  "grayscale": (device.grayscale, lambda x, wanted: host.grayscale(x) if wanted else x, (0, 1)),
  "blur": (device.blur, host.blur, (0.0, 0.1, 0.5, 1.0, 2.0)),
  "solarise": (device.solarise, lambda x, wanted: host.solarise(x) if wanted else x, (0, 1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_the_hosts(photographs, name):
  on_device, on_host, amounts = OPERATIONS[name]
  views, _ = drawn(T, photographs, 2)
  images = np.repeat(views.astype(np.float32) / 255, len(amounts), axis=0)
  given = np.tile(np.asarray(amounts), 2)
  given = given > 0 if name in ("grayscale", "solarise") else given.astype(np.float32)
  expected = [on_host(x, amount) for x, amount in zip(images, given.tolist(), strict=True)]
  result = jax.jit(on_device)(images.transpose(0, 3, 1, 2), given)
  # 2e-5 is a two-hundredth of a grey level.
  np.testing.assert_allclose(result.transpose(0, 2, 3, 1), np.stack(expected), rtol=0, atol=2e-5)


def test_every_colour_through_hsv():
  levels = np.array([0, 1, 2, 31, 64, 100, 127, 128, 200, 254, 255], np.float32) / 255
  colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
  image = colours.reshape(11, 121, 3)
  for operation, amounts in (("saturation", (0.0, 0.7, 1.0, 1.3, 50.0)), ("hue", HUE_AMOUNTS)):
    on_device, on_host, _ = OPERATIONS[operation]
    planes = np.stack([image.transpose(2, 0, 1)] * len(amounts))
    result = np.asarray(jax.jit(on_device)(planes, np.asarray(amounts, np.float32)))
    for i, amount in enumerate(amounts):
      expected = on_host(image, amount).transpose(2, 0, 1)
      np.testing.assert_allclose(result[i], expected, rtol=0, atol=1e-5, err_msg=str(amount))
    assert 0 <= result.min() <= result.max() <= 1


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_every_order_equals_the_hosts(photographs, rule):
  orders = np.array(list(itertools.permutations(range(4))), np.int32)
  views, draws = drawn(STRONG, photographs, 4 * len(orders), size=32)
  draws = draws._replace(order=np.repeat(orders, 4, axis=0))
  if rule == "multiplicative":
    draws = draws._replace(brightness=1 + draws.brightness)
  on_device = by_device(views, draws, rule)
  on_host = by_host(views, draws, rule) * LEVEL
  np.testing.assert_allclose(on_device, on_host, rtol=0, atol=ROUNDING + 0.01 * LEVEL)
  # The order is seen in most views.
  reversed_ = by_device(views, draws._replace(order=draws.order[:, ::-1]), rule)
  assert (np.abs(reversed_ - on_device).max(axis=(1, 2, 3)) > 2 * LEVEL).mean() > 0.8


@pytest.mark.parametrize("size", [16, 28])
def test_small_views_equal_the_hosts(photographs, size):
  views, draws = drawn(STRONG, photographs, 64, size=size)
  assert 0 < draws.flip.sum() < 64
  on_device = by_device(views, draws)
  on_host = by_host(views, draws) * LEVEL
  np.testing.assert_allclose(on_device, on_host, rtol=0, atol=ROUNDING + 0.01 * LEVEL)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_view_of_one_colour_has_no_nan(grey):
  views = np.full((32, 16, 16, 3), grey, np.uint8)
  rng = np.random.default_rng(0)
  draws = Draws(*map(np.stack, zip(*(draw(STRONG, rng, 16, 16) for _ in views))))
  on_device = by_device(views, draws)
  on_host = by_host(views, draws) * LEVEL
  np.testing.assert_allclose(on_device, on_host, rtol=0, atol=ROUNDING + 0.01 * LEVEL)


# ------------------------------------------------------------------------------------------------
# Several devices, and a TPU's arithmetic
# ------------------------------------------------------------------------------------------------


def test_eight_devices_work_apart_and_agree_with_one(photographs):
  views, draws = drawn(T, photographs, 16, size=96)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  assert mesh.size == 8
  views, draws = jax.device_put((views, draws), sharding)
  compiled = apply_jitted.lower(views, draws, brightness_rule="additive").compile()
  spread = compiled(views, draws)
  assert spread.sharding.is_equivalent_to(sharding, 4)
  assert not any(word in compiled.as_text() for word in ("all-", "collective", "permute"))
  together = by_device(*jax.device_get((views, draws)))
  np.testing.assert_allclose(spread, together, rtol=0, atol=1e-6)


def bfloat16_products(passes):
  """An einsum of two arrays as a TPU does it: `lax.Precision.HIGH` is three passes in bfloat16."""
  exact = jnp.einsum

  def bfloat16(x):
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

  def einsum(spec, a, b, precision):
    assert precision == lax.Precision.HIGH
    a_high, b_high = bfloat16(a), bfloat16(b)
    result = exact(spec, a_high, b_high)
    if passes == 3:
      result += exact(spec, a_high, bfloat16(b - b_high))
      result += exact(spec, bfloat16(a - a_high), b_high)
    return result

  return einsum


def test_blur_in_bfloat16_passes(photographs, monkeypatch):
  views, draws = drawn(T, photographs, 20)
  exact, off = by_device(views, draws), {}
  for passes in (1, 3):
    with monkeypatch.context() as patch:
      patch.setattr(jnp, "einsum", bfloat16_products(passes))
      apply = jax.jit(lambda u, d: apply_device(u, d, "additive"))
      off[passes] = np.abs(np.asarray(apply(views, draws)) - exact).max() / LEVEL
  assert off[1] > 0.8  # with what the host rounds, more than a grey level
  assert off[3] < 0.02
