"""The two bodies of the colour work, against the reference's numbers, plain oracles, each other."""

import colorsys
import functools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byolx.data.augment import on_device as device
from byolx.data.augment import on_host as host
from byolx.data.augment.distribution import Draws, ViewSpec, blur_radius, draw
from byolx.data.augment.on_device import apply_device, normalise
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.resizing import crop_and_resize

T = ViewSpec()
T_PRIME = ViewSpec(blur_probability=0.1, solarise_probability=0.2)
LEVEL = 1 / 255
apply_jitted = jax.jit(apply_device, static_argnames="brightness_rule")


# ------------------------------------------------------------------------------------------------
# Oracles: the paper's formulas, pixel by pixel, on float64 images
# ------------------------------------------------------------------------------------------------


def brightness(x, d):
  return np.clip(x + d, 0, 1)


def brightness_factor(x, f):
  return np.clip(x * f, 0, 1)


def contrast(x, f):
  y = np.empty_like(x)
  for channel in range(3):
    mean = x[..., channel].sum() / x[..., channel].size
    y[..., channel] = f * (x[..., channel] - mean) + mean
  return np.clip(y, 0, 1)


def through_hsv(x, change):
  pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3)]
  return np.array(pixels).reshape(x.shape)


def saturation(x, f):
  return through_hsv(x, lambda h, s, v: (h, min(max(s * f, 0), 1), v))


def hue(x, d):
  return through_hsv(x, lambda h, s, v: ((h + d) % 1, s, v))


def grayscale(x):
  luma = 0.2989 * x[..., 0] + 0.5870 * x[..., 1] + 0.1140 * x[..., 2]
  return np.stack([luma] * 3, axis=-1)


def blur(x, sigma):
  """A square of weights moved over the image, zeros outside."""
  if sigma == 0:
    return x
  radius = int(x.shape[0] / 10 / 2)
  i, j = np.mgrid[-radius : radius + 1, -radius : radius + 1]
  kernel = np.exp(-(i**2 + j**2) / (2 * sigma**2))
  kernel /= kernel.sum()
  padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)))
  h, w = x.shape[:2]
  y = np.zeros_like(x)
  for a in range(2 * radius + 1):
    for b in range(2 * radius + 1):
      y += kernel[a, b] * padded[a : a + h, b : b + w]
  return y


def solarise(x):
  return x * (x < 0.5) + (1 - x) * (x >= 0.5)


def whole_view(view, d, rule):
  x = view.astype(np.float64) / 255
  if d.flip:
    x = x[:, ::-1]
  if d.jitter:
    brighten = brightness if rule == "additive" else brightness_factor
    operations = [brighten, contrast, saturation, hue]
    amounts = [d.brightness, d.contrast, d.saturation, d.hue]
    for i in d.order:
      x = operations[i](x, float(amounts[i]))
  if d.grayscale:
    x = grayscale(x)
  x = blur(x, float(d.sigma))
  if d.solarise:
    x = solarise(x)
  return np.clip(x, 0, 1)


class Operation(NamedTuple):
  """One operation three times, and the amounts to try; host and oracle take one image."""

  oracle: Callable
  host: Callable
  device: Callable
  amounts: tuple[float, ...]


def switch(operation):
  """A plain operation as one with an amount, of which only one means to apply it."""
  return lambda x, amount: operation(x) if amount else x


def device_switch(operation):
  return lambda x, amount: operation(x, amount > 0)


OPERATIONS = {
  "brightness": Operation(
    brightness, host.brightness, device.brightness, (-1.0, -0.4, 0.0, 0.15, 0.4, 1.0)
  ),
  "brightness_factor": Operation(
    brightness_factor,
    functools.partial(host.brightness, rule="multiplicative"),
    functools.partial(device.brightness, rule="multiplicative"),
    (0.0, 0.6, 1.0, 1.1, 1.4, 2.0),
  ),
  "contrast": Operation(contrast, host.contrast, device.contrast, (0.0, 0.6, 1.0, 1.1, 1.4, 2.0)),
  "saturation": Operation(
    saturation, host.saturation, device.saturation, (0.0, 0.8, 1.0, 1.05, 1.2, 2.0)
  ),
  "hue": Operation(hue, host.hue, device.hue, (-0.5, -0.1, 0.0, 0.03, 0.1, 0.5)),
  "grayscale": Operation(
    switch(grayscale), switch(host.grayscale), device_switch(device.grayscale), (0, 1)
  ),
  "blur": Operation(blur, host.blur, device.blur, (0.0, 0.1, 0.4, 0.7, 1.3, 2.0)),
  "solarise": Operation(
    switch(solarise), switch(host.solarise), device_switch(device.solarise), (0, 1)
  ),
}


def on_device(operation, images, amounts):
  """A device operation under jit, on images [b h w 3]."""

  def run(x, amount):
    return operation(x.transpose(0, 3, 1, 2), amount).transpose(0, 2, 3, 1)

  return np.asarray(jax.jit(run)(jnp.asarray(images), jnp.asarray(amounts, jnp.float32)))


@pytest.fixture(scope="module")
def images():
  """Six float32 images, 40 x 40 (five taps): photographic, noise, greys, corners of the cube."""
  rng = np.random.default_rng(0)
  smooth = rng.random((6, 6, 3), np.float32)
  smooth = cv2.resize(smooth, (40, 40), interpolation=cv2.INTER_LINEAR)
  grey = np.repeat(rng.random((40, 40, 1), np.float32), 3, axis=-1)
  levels = rng.integers(0, 256, (40, 40, 3)).astype(np.float32) / 255
  corners = rng.integers(0, 2, (40, 40, 3)).astype(np.float32)
  dark = levels * np.float32(1e-3)
  constant = np.full((40, 40, 3), (0.2, 0.6, 0.4), np.float32)
  return np.stack([smooth, grey, levels, corners, dark, constant])


def batch(draws):
  return Draws(*map(np.stack, zip(*draws)))


def random_batch(spec, n, size, seed=0):
  """n views of random crops of one noisy, strongly coloured image, and their draws."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
  image = cv2.resize(image, (60, 50), interpolation=cv2.INTER_NEAREST)
  draws = [draw(spec, rng, 50, 60) for _ in range(n)]
  return np.stack([crop_and_resize(image, d.crop, size, False) for d in draws]), draws


def plain_draws(**changes):
  """Draws that change nothing, but for what is given."""
  scalars = {
    "brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 0.0
  }  # fmt: skip
  fields = {name: np.array(value, np.float32) for name, value in scalars.items()}
  fields |= {name: np.array(False) for name in ("flip", "jitter", "grayscale", "solarise")}
  fields |= {"crop": np.array([0, 0, 1, 1], np.int32), "order": np.arange(4, dtype=np.int32)}
  return Draws(
    **fields | {name: np.array(value, fields[name].dtype) for name, value in changes.items()}
  )


# ------------------------------------------------------------------------------------------------
# What the reference printed
# ------------------------------------------------------------------------------------------------

GOLDEN = {
  "brightness": "brightness",
  "contrast": "contrast",
  "saturation": "saturation",
  "hue": "hue",
  "grayscale": "grayscale",
  "blur": "blur224",
  "solarise": "solarize",
}


def golden_cases(archive, name):
  """The amounts and results of one operation, in the archive's order."""
  names = [key for key in archive if key.split("_")[0] == GOLDEN[name]]
  amounts = [float(key.split("_")[1]) if "_" in key else 1.0 for key in names]
  return amounts, [archive[key] for key in names]


@pytest.fixture(scope="module")
def reference(golden):
  return golden("augment")


@pytest.fixture(scope="module")
def photo(reference):
  return reference["image"].astype(np.float32) / 255


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(reference, photo, name):
  amounts, expected = golden_cases(reference, name)
  assert len(expected) in (1, 3, 4)
  on_host = [OPERATIONS[name].host(photo, amount) for amount in amounts]
  jitted = on_device(OPERATIONS[name].device, np.stack([photo] * len(amounts)), amounts)
  for h, d, result in zip(on_host, jitted, expected, strict=True):
    np.testing.assert_allclose(h[0:112:2, 0:112:2], result, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d[0:112:2, 0:112:2], result, rtol=0, atol=1e-5)


def test_golden_blur_to_the_borders(reference, photo):
  patch = np.ascontiguousarray(photo[:96, :96])
  expected = [reference["blur96_0.7"], reference["blur96_2.0"]]
  jitted = on_device(device.blur, np.stack([patch, patch]), [0.7, 2.0])
  for sigma, d, result in zip((0.7, 2.0), jitted, expected, strict=True):
    assert result[0].mean() < result[4].mean()  # zeros darken the border
    np.testing.assert_allclose(host.blur(patch, sigma)[::2, ::2], result, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d[::2, ::2], result, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_golden_chain(reference, flip):
  image = reference["image"]
  order = [1, 3, 0, 2]
  draws = plain_draws(
    jitter=True, order=order, brightness=0.2, contrast=1.3, saturation=1.15, hue=-0.07, sigma=1.1,
    solarise=True, flip=flip,
  )  # fmt: skip
  view = np.ascontiguousarray(image[:, ::-1]) if flip else image  # mirrored twice is as it was
  expected = reference["chain"]
  d = np.asarray(apply_jitted(view[None], batch([draws]), brightness_rule="additive"))[0]
  np.testing.assert_allclose(d[0:112:2, 0:112:2], expected, rtol=0, atol=1e-5)
  h = apply_host(view, draws, "additive")[0:112:2, 0:112:2].astype(np.float64)
  np.testing.assert_allclose(h, expected * 255, rtol=0, atol=0.51)


# ------------------------------------------------------------------------------------------------
# Oracles
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_its_formula(images, name):
  operation = OPERATIONS[name]
  pairs = [(image, amount) for image in images for amount in operation.amounts]
  expected = np.stack([operation.oracle(x.astype(np.float64), a) for x, a in pairs])
  on_host = np.stack([operation.host(x, a) for x, a in pairs])
  jitted = on_device(operation.device, np.stack([x for x, _ in pairs]), [a for _, a in pairs])
  assert on_host.dtype == jitted.dtype == np.float32
  np.testing.assert_allclose(on_host, expected, rtol=0, atol=1e-5)
  np.testing.assert_allclose(jitted, expected, rtol=0, atol=1e-5)
  for result in (on_host, jitted):
    assert 0 <= result.min() <= result.max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_host_operation_leaves_its_input(images, name):
  before = images.copy()
  for amount in OPERATIONS[name].amounts:
    OPERATIONS[name].host(images[2], amount)
  np.testing.assert_array_equal(images, before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.floats(0, 2), st.floats(-0.5, 0.5))
def test_any_colour_through_hsv(rgb, factor, shift):
  x = np.full((1, 1, 3), np.array(rgb) / 255, np.float32)
  y = x.astype(np.float64)
  np.testing.assert_allclose(host.saturation(x, factor), saturation(y, factor), atol=1e-5)
  np.testing.assert_allclose(host.hue(x, shift), hue(y, shift), atol=1e-5)


def test_hue_turns_red_into_green():
  red = np.zeros((4, 4, 3), np.float32)
  red[..., 0] = 0.8
  expected = red[..., [1, 0, 2]]
  np.testing.assert_allclose(host.hue(red, 1 / 3), expected, atol=1e-6)
  np.testing.assert_allclose(on_device(device.hue, red[None], [1 / 3])[0], expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_mixed_batch_equals_the_oracle(rule):
  spec = ViewSpec(
    brightness_rule=rule, jitter_probability=0.7, blur_probability=0.5, solarise_probability=0.4,
    grayscale_probability=0.3, hue=0.5, saturation=1.0, contrast=1.0,
  )  # fmt: skip
  views, draws = random_batch(spec, 32, 28)
  for flags in ("flip", "jitter", "grayscale", "solarise"):
    assert {bool(getattr(d, flags)) for d in draws} == {False, True}
  assert {bool(d.sigma > 0) for d in draws} == {False, True}
  assert len({tuple(d.order) for d in draws}) > 12
  jitted = np.asarray(apply_jitted(views, batch(draws), brightness_rule=rule))
  for view, one, result in zip(views, draws, jitted, strict=True):
    expected = whole_view(view, one, rule)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
    on_host = apply_host(view, one, rule)
    assert on_host.dtype == np.uint8
    np.testing.assert_allclose(on_host, expected * 255, rtol=0, atol=0.51)


# ------------------------------------------------------------------------------------------------
# The two bodies, whole views
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [T, T_PRIME], ids=["T", "T_prime"])
def test_bodies_agree_to_one_grey_level(spec):
  views, draws = random_batch(spec, 1000, 32)
  jitted = np.asarray(apply_jitted(views, batch(draws), brightness_rule="additive"))
  on_host = np.stack([apply_host(v, d, "additive") for v, d in zip(views, draws, strict=True)])
  assert jitted.dtype == np.float32
  assert np.abs(on_host / 255 - jitted).max() <= 0.51 * LEVEL  # what rounding takes
  assert np.abs(on_host / 255 - views / 255).mean() > 0.02  # something did happen


def test_nothing_drawn_changes_nothing():
  view = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
  still, flipped = plain_draws(), plain_draws(flip=True)
  np.testing.assert_array_equal(apply_host(view, still, "additive"), view)
  np.testing.assert_array_equal(apply_host(view, flipped, "additive"), view[:, ::-1])
  both = apply_jitted(np.stack([view] * 2), batch([still, flipped]), brightness_rule="additive")
  levels = np.rint(np.asarray(both) * 255).astype(np.uint8)
  np.testing.assert_array_equal(levels, np.stack([view, view[:, ::-1]]))


def test_small_views_are_not_blurred():
  view = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
  assert blur_radius(16) == 0
  np.testing.assert_array_equal(apply_host(view, plain_draws(sigma=2.0), "additive"), view)


def test_flip_comes_before_the_colours_and_blur_before_solarise():
  view = np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8)
  x = view.astype(np.float64) / 255
  blurred_first = solarise(blur(x, 1.0))
  assert np.abs(blurred_first - blur(solarise(x), 1.0)).max() > 0.1
  result = apply_host(view, plain_draws(sigma=1.0, solarise=True), "additive")
  np.testing.assert_allclose(result, blurred_first * 255, rtol=0, atol=0.51)


def test_apply_host_leaves_the_view():
  views, draws = random_batch(T, 10, 28)
  before = views.copy()
  for view, one in zip(views, draws, strict=True):
    apply_host(view, one, "additive")
  np.testing.assert_array_equal(views, before)


def test_unknown_rule_is_refused():
  views, draws = random_batch(T, 1, 16)
  with pytest.raises(ValueError, match="'subtractive'; expected one of additive, multiplicative"):
    apply_host(views[0], draws[0], "subtractive")
  with pytest.raises(ValueError, match="'subtractive'; expected one of additive, multiplicative"):
    apply_device(views, batch(draws), "subtractive")


def test_normalise():
  x = np.random.default_rng(0).random((2, 3, 3, 3)).astype(np.float32)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  expected = (x - np.array(mean)) / np.array(std)
  y = jax.jit(lambda x: normalise(x, mean, std))(x)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
