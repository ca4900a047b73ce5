"""Applies flip, colour jitter, grayscale, blur and solarise to one view on the host (numpy, OpenCV).

The operations are those of appendix C of the paper, with the order and arithmetic of the authors' code.
Each operation maps a float32 image in [0, 1] to another one; `apply_host` applies them in turn, with the
random numbers of one view (`Draws`). `on_device` has the same functions for batches, in jnp.
"""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from byolx.data.augment.distribution import (
  BRIGHTNESS,
  CONTRAST,
  SATURATION,
  Draws,
  blur_radius,
  check_brightness_rule,
)

_DEGREES = 360.0  # range of the hue of OpenCV's float images
_LUMA = np.tile(np.array([0.2989, 0.5870, 0.1140], np.float32), (3, 1))


def brightness(
  x: Float32[np.ndarray, "h w 3"], amount: float, rule: str = "additive"
) -> Float32[np.ndarray, "h w 3"]:
  """Changes the brightness of an image: adds `amount` to all values, or multiplies them by it.

  The result is clipped to [0, 1].

  Args:
    x: image in [0, 1].
    amount: number added to all values, or their factor.
    rule: name of the rule: 'additive' for x + amount, or 'multiplicative' for x * amount.
  """
  y = x * np.float32(amount) if rule == "multiplicative" else x + np.float32(amount)
  return y.clip(0, 1, out=y)


def contrast(x: Float32[np.ndarray, "h w 3"], factor: float) -> Float32[np.ndarray, "h w 3"]:
  """Changes the contrast of an image to factor * (x - mean) + mean, clipped to [0, 1].

  Each channel has its own mean.
  """
  red, green, blue, _ = cv2.mean(x)
  rest = 1 - factor
  y = cv2.transform(
    x,
    np.array(
      [[factor, 0, 0, rest * red], [0, factor, 0, rest * green], [0, 0, factor, rest * blue]],
      np.float32,
    ),
  )
  return y.clip(0, 1, out=y)


def saturation(x: Float32[np.ndarray, "h w 3"], factor: float) -> Float32[np.ndarray, "h w 3"]:
  """Multiplies the saturation (HSV) of an image by `factor`, and clips it to 1."""
  hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
  s = hsv[..., 1]
  np.minimum(s * np.float32(factor), 1, out=s)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def hue(x: Float32[np.ndarray, "h w 3"], shift: float) -> Float32[np.ndarray, "h w 3"]:
  """Shifts the hue (HSV) of an image by `shift`, a share of the colour circle."""
  hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
  hsv[..., 0] += np.float32(_DEGREES * (shift % 1))  # OpenCV wraps hues above 360, not below 0
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def grayscale(x: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
  """Converts an image to grey: each channel becomes 0.2989 r + 0.5870 g + 0.1140 b."""
  return cv2.transform(x, _LUMA)


def blur(x: Float32[np.ndarray, "h w 3"], sigma: float) -> Float32[np.ndarray, "h w 3"]:
  """Blurs an image with a Gaussian kernel and zero padding, and clips the result to [0, 1].

  The kernel has 2 * blur_radius(h) + 1 taps on each axis. Taps smaller than 1e-7 times the central one
  are left out, for speed.

  Args:
    x: image in [0, 1].
    sigma: standard deviation of the kernel in pixels; 0 for no blur.
  """
  radius = blur_radius(x.shape[0])
  if sigma == 0 or radius == 0:
    return x
  radius = min(radius, int(np.ceil(5.7 * sigma)))
  taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  taps = (taps / taps.sum()).astype(np.float32)
  y = cv2.sepFilter2D(x, -1, taps, taps, borderType=cv2.BORDER_CONSTANT)
  return y.clip(0, 1, out=y)


def solarise(x: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
  """Solarises an image: values x of at least 0.5 become 1 - x."""
  return np.minimum(x, 1 - x)


def apply_host(
  view: UInt8[np.ndarray, "s s 3"], draws: Draws, brightness_rule: str
) -> UInt8[np.ndarray, "s s 3"]:
  """Applies flip, colour jitter, grayscale, blur and solarise with the parameters in `draws`.

  Args:
    view: resized crop, from `resizing.crop_and_resize`.
    draws: random numbers of this view, not batched; the field `crop` is not used.
    brightness_rule: name of the rule, 'additive' for x + d or 'multiplicative' for x * d.

  Returns:
    The augmented view, values 0..255; `view` itself if `draws` asks for no operation.

  Raises:
    ValueError: unknown brightness rule.
  """
  check_brightness_rule(brightness_rule)
  if draws.flip:
    view = cv2.flip(view, 1)
  blurred = draws.sigma > 0 and blur_radius(view.shape[0]) > 0
  if not (draws.jitter or draws.grayscale or blurred or draws.solarise):
    return view
  x = view.astype(np.float32)
  x *= np.float32(1 / 255)
  if draws.jitter:
    x = _jitter(x, draws, brightness_rule)
  if draws.grayscale:
    x = grayscale(x)
  if blurred:
    x = blur(x, float(draws.sigma))
  if draws.solarise:
    x = solarise(x)
  return cv2.convertScaleAbs(x, alpha=255)


def _jitter(x, draws, brightness_rule):
  for operation in draws.order.tolist():
    if operation == BRIGHTNESS:
      x = brightness(x, float(draws.brightness), brightness_rule)
    elif operation == CONTRAST:
      x = contrast(x, float(draws.contrast))
    elif operation == SATURATION:
      x = saturation(x, float(draws.saturation))
    else:
      x = hue(x, float(draws.hue))
  return x
