"""Applies flip, colour jitter, grayscale, blur and solarise to batches on the device, in jnp.

Appendix C of the paper. The results differ from those of `on_host` by at most one grey level. Each
operation has one parameter per image, and one value of it changes nothing (the neutral value). So one
jitted program serves a batch whose images need different operations in different orders. Most of the
cost is memory traffic, which these choices reduce:

- Images are stored as planes, one per channel; a TPU lays out `b h w 3` in the same way.
- Saturation and hue commute, so they are changed together. The colour jitter (`_jitter`) has two steps
  of brightness or contrast. Saturation and hue are changed before, between and after these steps.
- The blur is two matrix products per plane. The second one also mirrors the image. On a TPU each
  product takes three bfloat16 passes, since one pass is not accurate enough.

`docs/augment_cost.py` prints the cost estimated by a TPU's compiler.
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
  """Changes the brightness of each image: adds `amount` to all values, or multiplies them by it.

  The result is clipped to [0, 1].

  Args:
    x: images in [0, 1].
    amount: number for each image, which is added to its values or is their factor.
    rule: name of the rule: 'additive' for x + amount, or 'multiplicative' for x * amount.
  """
  amount = _per_image(amount, x)
  return jnp.clip(x * amount if rule == "multiplicative" else x + amount, 0, 1)


def contrast(x: Float[Array, "b *c h w"], factor: Float[Array, "b"]) -> Float[Array, "b *c h w"]:
  """Changes the contrast of images to factor * (x - mean) + mean, clipped to [0, 1].

  Each image has its own factor, and each channel of an image its own mean. A factor of 1 changes nothing.
  """
  factor = _per_image(factor, x)
  return jnp.clip(factor * x + (1 - factor) * x.mean(axis=(-2, -1), keepdims=True), 0, 1)


def saturation(x: Float[Array, "b 3 h w"], factor: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Multiplies the saturation (HSV) of each image by its factor, and clips it to 1."""
  return jnp.stack(_change_hsv(_planes(x), factor, jnp.zeros_like(factor)), axis=1)


def hue(x: Float[Array, "b 3 h w"], shift: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Shifts the hue (HSV) of each image by its `shift`, a share of the colour circle."""
  return jnp.stack(_change_hsv(_planes(x), jnp.ones_like(shift), shift), axis=1)


def grayscale(x: Float[Array, "b 3 h w"], selected: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Converts the selected images to grey: each channel becomes 0.2989 r + 0.5870 g + 0.1140 b."""
  luma = sum(weight * x[:, c : c + 1] for c, weight in enumerate(_LUMA))
  return jnp.where(_per_image(selected, x), luma, x)


def blur(x: Float[Array, "b 3 h w"], sigma: Float[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Blurs images with a Gaussian kernel and zero padding, and clips the result to [0, 1].

  The kernel has 2 * blur_radius(h) + 1 taps on each axis.

  Args:
    x: square images in [0, 1].
    sigma: standard deviation of each image's kernel in pixels; 0 for no blur.
  """
  if blur_radius(x.shape[2]) == 0:
    return x
  return _blur_and_mirror(x, sigma, jnp.zeros(sigma.shape, bool))


def solarise(x: Float[Array, "b 3 h w"], selected: Bool[Array, "b"]) -> Float[Array, "b 3 h w"]:
  """Solarises the selected images: values x of at least 0.5 become 1 - x."""
  return jnp.where(_per_image(selected, x), jnp.minimum(x, 1 - x), x)


def apply_device(
  views: UInt8[Array | np.ndarray, "b s s 3"], draws: Draws, brightness_rule: str
) -> Float[Array, "b s s 3"]:
  """Applies flip, colour jitter, grayscale, blur and solarise with the parameters in `draws`.

  Args:
    views: resized crops, from `resizing.crop_and_resize`.
    draws: random numbers of each view, batched; its field `crop` is not used.
    brightness_rule: name of the rule, 'additive' for x + d or 'multiplicative' for x * d; static
      under jit.

  Returns:
    Views, float32 in [0, 1].

  Raises:
    ValueError: unknown brightness rule.
  """
  check_brightness_rule(brightness_rule)
  draws = jax.tree.map(jnp.asarray, draws)
  planes = tuple(jnp.asarray(views[..., c], jnp.float32) / 255 for c in range(3))
  planes = _jitter(planes, draws, brightness_rule)
  # The barrier keeps XLA from splitting the last conversion among its consumers, a loss on a TPU.
  x = jnp.stack(lax.optimization_barrier(planes), axis=1)
  x = grayscale(x, draws.grayscale)
  x = _blur_and_mirror(x, draws.sigma, draws.flip)
  x = solarise(x, draws.solarise)
  return x.transpose(0, 2, 3, 1)


def normalise(
  x: Float[Array, "*b 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "*b 3"]:
  """Normalises augmented images channel by channel: returns (x - mean) / std.

  Args:
    x: images in [0, 1].
    mean, std: mean and standard deviation of each channel, for values in [0, 1].
  """
  return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


def network_input(
  images: UInt8[Array | np.ndarray, "b s s 3"] | Float[Array, "b s s 3"],
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  dtype: DTypeLike = jnp.float32,
  draws: Draws | None = None,
  brightness_rule: str = "additive",
) -> Float[Array, "b s s 3"]:
  """Prepares images for the network: augments them if `draws` is given, then normalises them.

  Args:
    images: images, uint8 0..255 or floating-point in [0, 1]; uint8 crops if `draws` is given.
    mean, std: mean and standard deviation of each channel, for values in [0, 1].
    dtype: data type of the result.
    draws: random numbers of the augmentation (`apply_device`); None if the images are not to be
      augmented here.
    brightness_rule: name of the augmentation's rule for brightness, 'additive' or 'multiplicative'.

  Returns:
    Normalised images of the given dtype.
  """
  if draws is not None:
    images = apply_device(images, draws, brightness_rule)
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255.0
  return normalise(images, mean, std).astype(dtype)


def _jitter(planes: Planes, draws: Draws, brightness_rule: str) -> Planes:
  """Applies brightness, contrast, saturation and hue, in the order drawn for each image.

  All images pass through the same five changes: HSV, step, HSV, step, HSV. A step changes brightness or
  contrast. "HSV" changes saturation and hue; their order does not matter. If n steps precede saturation
  in an image's drawn order, its saturation changes in the HSV change after n steps. The same holds for
  hue. In the other HSV changes the parameters are neutral: they change nothing.
  """
  neutral_brightness = 1.0 if brightness_rule == "multiplicative" else 0.0
  position = jnp.argsort(draws.order, axis=1)  # position of each operation in the order
  step_positions = position[:, [BRIGHTNESS, CONTRAST]]

  def amount(operation, step, neutral, drawn):
    active = jnp.sum(step_positions < position[:, operation, None], axis=1) == step
    return jnp.where(draws.jitter & active, drawn, neutral)

  for step in range(3):
    factor = amount(SATURATION, step, 1.0, draws.saturation)
    planes = _change_hsv(planes, factor, amount(HUE, step, 0.0, draws.hue))
    if step < 2:
      factor = amount(CONTRAST, step, 1.0, draws.contrast)
      change = amount(BRIGHTNESS, step, neutral_brightness, draws.brightness)
      planes = tuple(brightness(contrast(x, factor), change, brightness_rule) for x in planes)
  return planes


def _change_hsv(planes: Planes, factor: Float[Array, "b"], shift: Float[Array, "b"]) -> Planes:
  """Multiplies the saturation by `factor` and adds `shift` to the hue, without a conversion to HSV.

  V is the largest channel, and V * S is the difference of the largest and the smallest channel
  (`spread`). At hue h, in sixths of the circle, a channel is V - V * S + V * S * clip(f(h), 0, 1),
  where f is |h - 3| - 1 for red, 2 - |h - 2| for green and 2 - |h - 4| for blue. `angle` is
  h * V * S, which avoids a division by V * S.
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
  """Blurs each image by two matrix products, and mirrors it left to right if `mirror` is set.

  Args:
    x: square images in [0, 1].
    sigma: standard deviation of each image's kernel in pixels; 0 for no blur.
    mirror: whether to mirror each image.
  """
  size = x.shape[2]
  rows = _blur_matrix(size, sigma, jnp.zeros_like(mirror))
  columns = _blur_matrix(size, sigma, mirror)
  x = jnp.einsum("bih,bchw->bciw", rows, x, precision=_BLUR_PRECISION)
  x = jnp.einsum("bchw,bjw->bchj", x, columns, precision=_BLUR_PRECISION)
  return jnp.clip(x, 0, 1)


def _blur_matrix(
  size: int, sigma: Float[Array, "b"], mirror: Bool[Array, "b"]
) -> Float[Array, "b size size"]:
  """Returns one matrix per image, which blurs a line of `size` pixels.

  If `mirror` is set for the image, the matrix also mirrors the line.

  Element [b, i, j] is the weight of pixel j of the line in pixel i of the blurred line.
  """
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
  """Reshapes an array with one parameter per image, [b], so that it broadcasts against x [b ...]."""
  return jnp.reshape(parameter, (-1,) + (1,) * (x.ndim - 1))
