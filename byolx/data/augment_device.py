"""The colour work of a view on the device: jnp, a batch at a time, inside the jitted step.

Appendix C of the paper in the reference's order and arithmetic, the twin of `augment_host`. Every
operation takes one parameter per image and has a neutral one, so a batch whose images want
different operations in different orders runs one program: each operation in each turn, neutral
for the images that do not want it. Operations take images as planes, `b 3 h w`, of which XLA makes
faster code than of `b h w 3` (two to three times on a CPU); values are floats in [0, 1].
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from byolx.data.augment import (
  BRIGHTNESS,
  CONTRAST,
  HUE,
  SATURATION,
  Draws,
  blur_radius,
  check_brightness_rule,
)

_LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32).reshape(3, 1, 1)


def brightness(
  x: Float[Array, "b 3 h w"], amount: Float[Array, "b"], rule: str = "additive"
) -> Float[Array, "b 3 h w"]:
  """x + amount (neutral: 0), or x * amount (neutral: 1) if the rule is 'multiplicative'."""
  amount = _per_image(amount)
  return jnp.clip(x * amount if rule == "multiplicative" else x + amount, 0, 1)


def contrast(x: Float[Array, "b 3 h w"], factor: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """factor * (x - mean) + mean, with each image's mean per channel; neutral: 1."""
  mean = x.mean(axis=(2, 3), keepdims=True)
  return jnp.clip(_per_image(factor) * (x - mean) + mean, 0, 1)


def saturation(x: Float[Array, "b 3 h w"], factor: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Multiplies the S of HSV by `factor`, at most to 1; neutral: 1."""
  return _change_hsv(x, factor, jnp.zeros_like(factor))


def hue(x: Float[Array, "b 3 h w"], shift: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Adds `shift` to the H of HSV, modulo 1; neutral: 0."""
  return _change_hsv(x, jnp.ones_like(shift), shift)


def grayscale(x: Float[Array, "b 3 h w"], wanted: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Luma 0.2989 r + 0.5870 g + 0.1140 b in all three channels, where wanted."""
  return jnp.where(_per_image(wanted), jnp.sum(x * _LUMA, axis=1, keepdims=True), x)


def blur(x: Float[Array, "b 3 h w"], sigma: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Gaussian blur with 2 * blur_radius(h) + 1 taps per axis, zeros outside; none if sigma is 0."""
  radius = blur_radius(x.shape[2])
  if radius == 0:
    return x
  sigma = sigma[:, None]
  offsets = np.arange(-radius, radius + 1, dtype=np.float32)
  taps = jnp.exp(-0.5 * (offsets / jnp.where(sigma > 0, sigma, 1)) ** 2)
  taps = jnp.where(sigma > 0, taps, offsets == 0)
  taps /= taps.sum(axis=1, keepdims=True)
  # Shifted sums rather than matrix products: full float32 whatever the matmul precision.
  for axis in (2, 3):
    padding = [(0, 0)] * 4
    padding[axis] = (radius, radius)
    padded, size = jnp.pad(x, padding), x.shape[axis]
    x = sum(
      _per_image(taps[:, i]) * lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i in range(2 * radius + 1)
    )
  return jnp.clip(x, 0, 1)


def solarise(x: Float[Array, "b 3 h w"], wanted: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """x where x < 0.5, and 1 - x elsewhere, where wanted."""
  return jnp.where(_per_image(wanted), jnp.minimum(x, 1 - x), x)


def apply_device(
  views: UInt8[Array | np.ndarray, "b s s 3"], draws: Draws, brightness_rule: str
) -> Float[Array, "b s s 3"]:
  """Flip, colour jitter, grayscale, blur and solarise, as `draws` says; float32 in [0, 1].

  Args:
    views: resized crops, from `augment.crop_and_resize`.
    draws: one per view, batched; the crops in it are not used.
    brightness_rule: that of the `ViewSpec` behind the draws; static under jit.

  Raises:
    ValueError: if the brightness rule is unknown.
  """
  check_brightness_rule(brightness_rule)
  draws = jax.tree.map(jnp.asarray, draws)
  x = jnp.asarray(views, jnp.float32).transpose(0, 3, 1, 2) / 255
  x = jnp.where(_per_image(draws.flip), x[..., ::-1], x)
  x = jnp.where(_per_image(draws.jitter), _jitter(x, draws, brightness_rule), x)
  x = grayscale(x, draws.grayscale)
  x = blur(x, draws.sigma)
  x = solarise(x, draws.solarise)
  return jnp.clip(x, 0, 1).transpose(0, 2, 3, 1)


def normalise(
  x: Float[Array, "*b 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "*b 3"]:
  """(x - mean) / std per channel: the last step before the network, after the augmentations."""
  return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


def _jitter(x, draws, brightness_rule):
  """The four colour operations, in each image's own order: four turns, one wanted in each."""
  no_change = 1.0 if brightness_rule == "multiplicative" else 0.0
  for turn in range(4):
    now = draws.order[:, turn]
    amount = jnp.where(now == BRIGHTNESS, draws.brightness, no_change)
    x = brightness(x, amount, brightness_rule)
    x = contrast(x, jnp.where(now == CONTRAST, draws.contrast, 1.0))
    factor = jnp.where(now == SATURATION, draws.saturation, 1.0)
    x = _change_hsv(x, factor, jnp.where(now == HUE, draws.hue, 0.0))
  return x


def _change_hsv(x, factor, shift):
  """Saturation and hue at once, without leaving RGB.

  V is the largest channel, V * S the spread between the largest and the smallest. At hue h, in
  sixths of the circle, a channel is V - V * S * clip(min(k, 4 - k), 0, 1), where k = h + n modulo 6
  and n = 5, 3, 1 for red, green, blue.
  """
  red, green, blue = x[:, 0], x[:, 1], x[:, 2]
  factor, shift = factor[:, None, None], shift[:, None, None]
  value = jnp.maximum(jnp.maximum(red, green), blue)
  spread = value - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1 / jnp.where(spread > 0, spread, 1)
  angle = jnp.where(
    red == value,
    (green - blue) * scale,
    jnp.where(green == value, 2 + (blue - red) * scale, 4 + (red - green) * scale),
  )
  spread = jnp.clip(factor * spread, 0, value)

  def channel(n):
    k = angle + 6 * shift + n
    k -= 6 * jnp.floor(k / 6)
    return value - spread * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.clip(jnp.stack([channel(5), channel(3), channel(1)], axis=1), 0, 1)


def _per_image(parameter):
  """[b] -> [b, 1, 1, 1]."""
  return jnp.reshape(parameter, (-1, 1, 1, 1))
