"""The colour work of a view on the host: numpy and OpenCV, one image at a time.

Appendix C of the paper in the reference's order and arithmetic. Every operation maps a float32
image in [0, 1] to a new one, clipped to [0, 1]; `apply_host` chains them for one view's `Draws`.
`augment_device` holds the same functions for batches in jnp.
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

_DEGREES = 360.0  # OpenCV's hue of a float image
_LUMA = np.tile(np.array([0.2989, 0.5870, 0.1140], np.float32), (3, 1))


def brightness(
  x: Float32[np.ndarray, "h w 3"], amount: float, rule: str = "additive"
) -> Float32[np.ndarray, "h w 3"]:
  """x + amount, or x * amount if the rule is 'multiplicative'."""
  y = x * np.float32(amount) if rule == "multiplicative" else x + np.float32(amount)
  return y.clip(0, 1, out=y)


def contrast(x: Float32[np.ndarray, "h w 3"], factor: float) -> Float32[np.ndarray, "h w 3"]:
  """factor * (x - mean) + mean, with each channel's mean over the image."""
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
  """Multiplies the S of HSV by `factor`, at most to 1."""
  hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
  s = hsv[..., 1]
  np.minimum(s * np.float32(factor), 1, out=s)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def hue(x: Float32[np.ndarray, "h w 3"], shift: float) -> Float32[np.ndarray, "h w 3"]:
  """Adds `shift` to the H of HSV, modulo 1."""
  hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
  hsv[..., 0] += np.float32(_DEGREES * (shift % 1))  # OpenCV wraps hues above 360, not below 0
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def grayscale(x: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
  """Luma 0.2989 r + 0.5870 g + 0.1140 b in all three channels."""
  return cv2.transform(x, _LUMA)


def blur(x: Float32[np.ndarray, "h w 3"], sigma: float) -> Float32[np.ndarray, "h w 3"]:
  """Gaussian blur with 2 * blur_radius(h) + 1 taps per axis, zeros outside; none if sigma is 0.

  Taps under 1e-7 of the middle one are left out, which halves the cost of an average blur.
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
  """x where x < 0.5, and 1 - x elsewhere."""
  return np.minimum(x, 1 - x)


def apply_host(
  view: UInt8[np.ndarray, "s s 3"], draws: Draws, brightness_rule: str
) -> UInt8[np.ndarray, "s s 3"]:
  """Flip, colour jitter, grayscale, blur and solarise, as `draws` says, rounded to grey levels.

  Args:
    view: the resized crop, from `resizing.crop_and_resize`; returned itself if nothing is drawn.
    draws: of this view, not batched; its crop is not used.
    brightness_rule: that of the `ViewSpec` behind the draws.

  Raises:
    ValueError: if the brightness rule is unknown.
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
