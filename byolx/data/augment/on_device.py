"""The colour work of a view on the device: jnp, a batch at a time, inside the jitted step.

Appendix C of the paper, the twin of `augment_host`: the same views to one grey level. Every
operation takes one parameter per image and has a neutral one, so a batch whose images want
different operations in different orders runs one program, whose cost is what moves through memory:

- Images are planes, one per channel, which is how a TPU lays out `b h w 3` anyway.
- Saturation and hue commute. So the jitter is two turns of brightness or contrast, and one
  conversion that changes saturation and hue before, between and after them (`_jitter`).
- The blur is two matrix products per plane, the second of which also mirrors the image. Their
  precision is three bfloat16 passes on a TPU; one pass would be wrong by up to two grey levels.

`docs/augment_cost.py` prints what a TPU's compiler estimates for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from byolx.data.augment.distribution import (
  BRIGHTNESS,
  CONTRAST,
  HUE,
  SATURATION,
  Draws,
  blur_radius,
  check_brightness_rule,
)

_LUMA = (0.2989, 0.5870, 0.1140)
_BLUR_PRECISION = lax.Precision.HIGH

Planes = tuple[Array, Array, Array]  # red, green, blue: Float[Array, "b h w"]


def brightness(
  x: Float[Array, "b *c h w"], amount: Float[Array, "b"], rule: str = "additive"
) -> Float[Array, "b *c h w"]:
  """x + amount (neutral: 0), or x * amount (neutral: 1) if the rule is 'multiplicative'."""
  amount = _per_image(amount, x)
  return jnp.clip(x * amount if rule == "multiplicative" else x + amount, 0, 1)


def contrast(x: Float[Array, "b *c h w"], factor: Float[Array, "b"]) -> Float[Array, "b *c h w"]:
  """factor * (x - mean) + mean, with each image's mean per channel; neutral: 1."""
  factor = _per_image(factor, x)
  return jnp.clip(factor * x + (1 - factor) * x.mean(axis=(-2, -1), keepdims=True), 0, 1)


def saturation(x: Float[Array, "b 3 h w"], factor: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Multiplies the S of HSV by `factor`, at most to 1; neutral: 1."""
  return jnp.stack(_change_hsv(_planes(x), factor, jnp.zeros_like(factor)), axis=1)


def hue(x: Float[Array, "b 3 h w"], shift: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Adds `shift` to the H of HSV, modulo 1; neutral: 0."""
  return jnp.stack(_change_hsv(_planes(x), jnp.ones_like(shift), shift), axis=1)


def grayscale(x: Float[Array, "b 3 h w"], wanted: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Luma 0.2989 r + 0.5870 g + 0.1140 b in all three channels, where wanted."""
  luma = sum(weight * x[:, c : c + 1] for c, weight in enumerate(_LUMA))
  return jnp.where(_per_image(wanted, x), luma, x)


def blur(x: Float[Array, "b 3 h w"], sigma: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Gaussian blur with 2 * blur_radius(h) + 1 taps per axis, zeros outside; none if sigma is 0."""
  if blur_radius(x.shape[2]) == 0:
    return x
  return _blur_and_mirror(x, sigma, jnp.zeros(sigma.shape, bool))


def solarise(x: Float[Array, "b 3 h w"], wanted: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """x where x < 0.5, and 1 - x elsewhere, where wanted."""
  return jnp.where(_per_image(wanted, x), jnp.minimum(x, 1 - x), x)


def apply_device(
  views: UInt8[Array | np.ndarray, "b s s 3"], draws: Draws, brightness_rule: str
) -> Float[Array, "b s s 3"]:
  """Flip, colour jitter, grayscale, blur and solarise, as `draws` says; float32 in [0, 1].

  Args:
    views: resized crops, from `resizing.crop_and_resize`.
    draws: one per view, batched; the crops in it are not used.
    brightness_rule: that of the `ViewSpec` behind the draws; static under jit.

  Raises:
    ValueError: if the brightness rule is unknown.
  """
  check_brightness_rule(brightness_rule)
  draws = jax.tree.map(jnp.asarray, draws)
  planes = tuple(jnp.asarray(views[..., c], jnp.float32) / 255 for c in range(3))
  planes = _jitter(planes, draws, brightness_rule)
  # The barrier keeps XLA from splitting the last conversion among its consumers: 13 % less on a TPU.
  x = jnp.stack(lax.optimization_barrier(planes), axis=1)
  x = grayscale(x, draws.grayscale)
  x = _blur_and_mirror(x, draws.sigma, draws.flip)
  x = solarise(x, draws.solarise)
  return x.transpose(0, 2, 3, 1)


def normalise(
  x: Float[Array, "*b 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "*b 3"]:
  """(x - mean) / std per channel: the last step before the network, after the augmentations."""
  return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


def network_input(
  images: UInt8[Array | np.ndarray, "b s s 3"] | Float[Array, "b s s 3"],
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  dtype: DTypeLike = jnp.float32,
  draws: Draws | None = None,
  brightness_rule: str = "additive",
) -> Float[Array, "b s s 3"]:
  """What a network sees of images: normalised, in the compute type.

  Args:
    images: uint8, or floating-point in [0, 1].
    mean, std: see `normalise`.
    dtype: of the result.
    draws: of crops whose colour work is still to be done, see `apply_device`; None: it is done.
    brightness_rule: see `apply_device`.
  """
  if draws is not None:
    images = apply_device(images, draws, brightness_rule)
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255.0
  return normalise(images, mean, std).astype(dtype)


def _jitter(planes: Planes, draws: Draws, brightness_rule: str) -> Planes:
  """The four colour operations, in each image's own order.

  Saturation and hue commute, though not with brightness or contrast, nor these two. So any order
  is a way through: conversion, turn, conversion, turn, conversion, where each of the two turns is
  brightness or contrast, and saturation and hue are each in the conversion that follows as many
  turns as their place in the order has before it.
  """
  no_change = 1.0 if brightness_rule == "multiplicative" else 0.0
  place = jnp.argsort(draws.order, axis=1)  # of each operation
  turns = place[:, [BRIGHTNESS, CONTRAST]]

  def amount(operation, turn, neutral, drawn):
    now = jnp.sum(turns < place[:, operation, None], axis=1) == turn
    return jnp.where(draws.jitter & now, drawn, neutral)

  for turn in range(3):
    factor = amount(SATURATION, turn, 1.0, draws.saturation)
    planes = _change_hsv(planes, factor, amount(HUE, turn, 0.0, draws.hue))
    if turn < 2:
      factor = amount(CONTRAST, turn, 1.0, draws.contrast)
      change = amount(BRIGHTNESS, turn, no_change, draws.brightness)
      planes = tuple(brightness(contrast(x, factor), change, brightness_rule) for x in planes)
  return planes


def _change_hsv(planes: Planes, factor: Float[Array, "b"], shift: Float[Array, "b"]) -> Planes:
  """Saturation and hue at once, without leaving RGB.

  V is the largest channel, V * S the spread between the largest and the smallest. At hue h, in
  sixths of the circle, a channel is V - V * S + V * S * clip(f(h), 0, 1), where f is |h - 3| - 1
  for red, 2 - |h - 2| for green and 2 - |h - 4| for blue. `angle` is h * V * S: nothing to divide.
  """
  red, green, blue = planes
  factor, shift = _per_image(factor, red), _per_image(shift, red)
  value = jnp.maximum(jnp.maximum(red, green), blue)
  spread = value - jnp.minimum(jnp.minimum(red, green), blue)
  shift = 6 * (shift % 1)
  shift = jnp.where(shift < 1, shift + 6, shift)  # in [1, 7), as the hue is in [-1, 5]
  at_red, at_green = red == value, green == value
  base = jnp.where(at_red, shift, jnp.where(at_green, shift + 2, shift + 4))
  angle = jnp.where(at_red, green - blue, jnp.where(at_green, blue - red, red - green))
  angle += base * spread
  angle -= jnp.where(angle >= 6 * spread, 6 * spread, 0)
  angle *= jnp.minimum(factor, value / jnp.where(spread > 0, spread, 1))
  spread = jnp.minimum(factor * spread, value)
  low = value - spread
  return (
    low + jnp.clip(jnp.abs(angle - 3 * spread) - spread, 0, spread),
    low + jnp.clip(2 * spread - jnp.abs(angle - 2 * spread), 0, spread),
    low + jnp.clip(2 * spread - jnp.abs(angle - 4 * spread), 0, spread),
  )


def _blur_and_mirror(
  x: Float[Array, "b 3 s s"], sigma: Float[Array, "b"], mirror: Bool[Array, "b"]
) -> Float[Array, "b 3 s s"]:
  """The blur by two banded matrices per image; that of the columns also reverses their order."""
  size = x.shape[2]
  rows = _blur_matrix(size, sigma, jnp.zeros_like(mirror))
  columns = _blur_matrix(size, sigma, mirror)
  x = jnp.einsum("bih,bchw->bciw", rows, x, precision=_BLUR_PRECISION)
  x = jnp.einsum("bchw,bjw->bchj", x, columns, precision=_BLUR_PRECISION)
  return jnp.clip(x, 0, 1)


def _blur_matrix(
  size: int, sigma: Float[Array, "b"], mirror: Bool[Array, "b"]
) -> Float[Array, "b size size"]:
  """What each pixel of a line (last axis) adds to each pixel of the blurred line."""
  radius = blur_radius(size)
  line = jnp.arange(size)
  source = jnp.where(mirror[:, None], size - 1 - line, line)
  offsets = line[:, None] - source[:, None, :]
  blurred = (sigma > 0)[:, None, None]
  scale = -0.5 / jnp.where(blurred, sigma[:, None, None], 1) ** 2
  taps = jnp.exp(scale * np.arange(-radius, radius + 1, dtype=np.float32) ** 2)
  weights = jnp.exp(scale * offsets.astype(jnp.float32) ** 2) / taps.sum(axis=2, keepdims=True)
  weights = jnp.where(jnp.abs(offsets) <= radius, weights, 0)
  return jnp.where(blurred, weights, offsets == 0)


def _planes(x: Float[Array, "b 3 h w"]) -> Planes:
  return x[:, 0], x[:, 1], x[:, 2]


def _per_image(parameter: Array, x: Array) -> Array:
  """[b], as an array that broadcasts against x [b ...]."""
  return jnp.reshape(parameter, (-1,) + (1,) * (x.ndim - 1))
