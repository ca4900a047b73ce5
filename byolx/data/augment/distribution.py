"""Distributions of augmentations, and the random numbers of one view (appendix C, Table 6).

A view is an augmented copy of an image. All its random numbers (`Draws`) are drawn first, by `draw`.
They are drawn from a `ViewSpec`, which describes one of the paper's distributions T and T'. The view
depends only on the image and these numbers. `resizing.crop_and_resize` crops and resizes it. Then
either `on_host.apply_host` (numpy and OpenCV) or `on_device.apply_device` (jnp, inside the jitted step)
applies all other operations. The results of these two functions differ by at most one grey level.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from byolx.core.fields import above, at_least, between, each, field, fields_of, interval, one_of
from byolx.data.augment.randaugment import RandAugment

CROP_RULES = ("one_draw", "retry")
BRIGHTNESS_RULES = ("additive", "multiplicative")

# The colour jitter's operations, as numbered in `Draws.order`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_TRIES = {"one_draw": 1, "retry": 10}


def check_brightness_rule(rule: str) -> None:
  """Checks that `rule` is the name of a brightness rule, 'additive' or 'multiplicative'.

  Raises:
    ValueError: `rule` is not one of `BRIGHTNESS_RULES`.
  """
  _check_choice("brightness_rule", rule, BRIGHTNESS_RULES)


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class ViewSpec:
  """Distribution from which the augmentation of a view is drawn.

  The defaults are the distribution T of Table 6; `ViewsSpec.view2` is T'.

  Attributes:
    crop_probability: probability of a random crop; otherwise the whole image is used.
    crop_area: range of the crop's area as a share of the image's area, sampled uniformly.
    crop_aspect: range of the crop's width / height, sampled uniformly on a logarithmic scale.
    crop_rule: rule for a sampled crop larger than the image. 'one_draw' clamps its sides to the image.
      'retry' samples up to ten times until the crop fits, and then uses the largest centre crop with an
      allowed aspect ratio.
    flip_probability: probability of a left-right flip.
    jitter_probability: probability of the colour jitter: brightness, contrast, saturation and hue, in
      random order.
    brightness, contrast, saturation: largest relative change m of each property, in [0, 1]. A factor
      is sampled uniformly in [1 - m, 1 + m]. For brightness with the rule 'additive', a number sampled in
      [-m, m] is added to all values instead.
    hue: largest hue shift as a share of the colour circle, in [0, 0.5].
    grayscale_probability: probability of the conversion to grey.
    blur_probability: probability of a Gaussian blur.
    blur_sigma: range of the blur's standard deviation in pixels, sampled uniformly.
    solarise_probability: probability of solarisation, in which values x of at least 0.5 become 1 - x.
    brightness_rule: name of the rule for a change of brightness by d: 'additive' for x + d, as in the
      authors' code, or 'multiplicative' for x * (1 + d).
    randaugment: settings of RandAugment, which is applied last and only on the host (appendix D.2); None
      to leave it out.

  Raises:
    ValueError: a field is out of range.
  """

  crop_probability: float = field(
    1.0, "probability of a random crop; otherwise the whole image", between(0, 1)
  )
  crop_area: tuple[float, float] = field(
    (0.08, 1.0),
    "range of the crop's area, as a share of the image's area",
    interval(1e-4, 1, "the whole image"),
  )
  crop_aspect: tuple[float, float] = field(
    (3 / 4, 4 / 3),
    "range of the crop's width / height, on a logarithmic scale",
    interval(0.01, 100),
  )
  flip_probability: float = field(0.5, "probability of a left-right flip", between(0, 1))
  jitter_probability: float = field(
    0.8,
    "probability of colour jitter: brightness, contrast, saturation, hue, in random order",
    between(0, 1),
  )
  brightness: float = field(0.4, "largest change of brightness", between(0, 1))
  contrast: float = field(0.4, "largest relative change of contrast", between(0, 1))
  saturation: float = field(0.2, "largest relative change of saturation", between(0, 1))
  hue: float = field(0.1, "largest shift of hue, as a share of the colour circle", between(0, 0.5))
  grayscale_probability: float = field(0.2, "probability of the conversion to grey", between(0, 1))
  blur_probability: float = field(1.0, "probability of a Gaussian blur", between(0, 1))
  blur_sigma: tuple[float, float] = field(
    (0.1, 2.0), "range of the blur's standard deviation, pixels", interval(1e-3, 100)
  )
  solarise_probability: float = field(0.0, "probability of solarisation", between(0, 1))
  crop_rule: str = "one_draw"
  brightness_rule: str = "additive"
  randaugment: RandAugment | None = None

  def __post_init__(self):
    for name, declared in fields_of(ViewSpec).items():
      value = getattr(self, name)
      if expected := declared.check(value):
        raise ValueError(f"{name} is {value}; expected {expected}")
    _check_choice("crop_rule", self.crop_rule, CROP_RULES)
    check_brightness_rule(self.brightness_rule)


@dataclass(frozen=True)
class ViewsSpec:
  """Config group `views`: the augmentations of both views, and the settings they share (Table 6)."""

  size: int = field(224, "side of a view, in pixels", at_least(4), encoder=True)
  crop_rule: str = field(
    ViewSpec.crop_rule,
    "rule for crops larger than the image: one_draw clamps the sides to the image; retry samples up to "
    "ten times, as torchvision",
    one_of(*CROP_RULES),
  )
  antialias: bool = field(False, "antialiasing when a crop shrinks")
  brightness_rule: str = field(
    ViewSpec.brightness_rule,
    "change of brightness by d: additive, x + d; multiplicative, x * (1 + d), as in PyTorch ports",
    one_of(*BRIGHTNESS_RULES),
  )
  placement: str = field(
    "host",
    "place of the augmentation after the crop: the loader (host), or the train step (device)",
    one_of("host", "device"),
  )
  mean: tuple[float, float, float] = field(
    (0.485, 0.456, 0.406),
    "mean of each channel, subtracted after augmentation",
    each(between(0, 1), 3),
    encoder=True,
  )
  std: tuple[float, float, float] = field(
    (0.229, 0.224, 0.225),
    "standard deviation of each channel, the divisor after augmentation",
    each(above(0), 3),
    encoder=True,
  )
  view1: ViewSpec = ViewSpec()
  view2: ViewSpec = ViewSpec(blur_probability=0.1, solarise_probability=0.2)


class Draws(NamedTuple):
  """Random numbers that determine the augmentation of one view (an augmented copy of an image).

  For a batch of views, each array has a leading axis.

  Attributes:
    crop: top, left, height and width of the crop, pixels of the source image.
    flip: whether the view is flipped left to right.
    jitter: whether the colour jitter is applied.
    order: order of the colour jitter's operations, a permutation of `BRIGHTNESS`, `CONTRAST`,
      `SATURATION` and `HUE`.
    brightness: number added to all values if `ViewSpec.brightness_rule` is 'additive'; their factor
      if it is 'multiplicative'.
    contrast, saturation: factors of contrast and saturation.
    hue: shift of the hue, as a share of the colour circle.
    grayscale: whether the view is converted to grey.
    sigma: standard deviation of the blur, pixels; 0 for no blur.
    solarise: whether the view is solarised: values of at least 0.5 are inverted.
  """

  crop: Int32[np.ndarray | Array, "*b 4"]
  flip: Bool[np.ndarray | Array, "*b"]
  jitter: Bool[np.ndarray | Array, "*b"]
  order: Int32[np.ndarray | Array, "*b 4"]
  brightness: Float32[np.ndarray | Array, "*b"]
  contrast: Float32[np.ndarray | Array, "*b"]
  saturation: Float32[np.ndarray | Array, "*b"]
  hue: Float32[np.ndarray | Array, "*b"]
  grayscale: Bool[np.ndarray | Array, "*b"]
  sigma: Float32[np.ndarray | Array, "*b"]
  solarise: Bool[np.ndarray | Array, "*b"]


def draw(spec: ViewSpec, rng: np.random.Generator, height: int, width: int) -> Draws:
  """Samples all random numbers of one view and returns them.

  The generator always gives the same number of values, whether or not they are used. So with the same
  seed, a change of one probability or strength in `spec` does not change the other random numbers.

  Args:
    spec: distribution to sample from.
    rng: random generator; it is called once.
    height: height of the image, pixels.
    width: width of the image, pixels.

  Raises:
    ValueError: the image is empty.
  """
  if height < 1 or width < 1:
    raise ValueError(f"the image is {height}x{width}; expected at least 1x1 pixels")
  tries = _TRIES[spec.crop_rule]
  u = rng.random(17 + 2 * tries).tolist()
  if u[0] < spec.crop_probability:
    crop = _draw_crop(spec, height, width, u[1], u[2], u[17:])
  else:
    crop = (0, 0, height, width)
  middle = 1.0 if spec.brightness_rule == "multiplicative" else 0.0
  blurred = u[14] < spec.blur_probability
  low, high = spec.blur_sigma
  return Draws(
    crop=np.array(crop, np.int32),
    flip=np.array(u[3] < spec.flip_probability),
    jitter=np.array(u[4] < spec.jitter_probability),
    order=np.array(sorted(range(4), key=u[5:9].__getitem__), np.int32),
    brightness=np.array(middle + spec.brightness * (2 * u[9] - 1), np.float32),
    contrast=np.array(1 + spec.contrast * (2 * u[10] - 1), np.float32),
    saturation=np.array(1 + spec.saturation * (2 * u[11] - 1), np.float32),
    hue=np.array(spec.hue * (2 * u[12] - 1), np.float32),
    grayscale=np.array(u[13] < spec.grayscale_probability),
    sigma=np.array(low + (high - low) * u[15] if blurred else 0.0, np.float32),
    solarise=np.array(u[16] < spec.solarise_probability),
  )


def _draw_crop(spec, height, width, u_top, u_left, u_shapes):
  """Computes the top, left, height and width of a crop, in pixels, from uniform random numbers.

  Args:
    spec: distribution of the view.
    height, width: size of the image, pixels.
    u_top, u_left: uniform numbers for the position of the crop.
    u_shapes: uniform numbers for the area and the aspect ratio, two for each try.
  """
  low, high = spec.crop_area
  narrow, wide = spec.crop_aspect
  retry = spec.crop_rule == "retry"
  for u_area, u_aspect in zip(u_shapes[::2], u_shapes[1::2]):
    area = (low + (high - low) * u_area) * height * width
    aspect = narrow * (wide / narrow) ** u_aspect
    w = max(1, round(math.sqrt(area * aspect)))
    h = max(1, round(math.sqrt(area / aspect)))
    if not retry or (w <= width and h <= height):
      h, w = min(h, height), min(w, width)
      return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
  h, w = height, width
  if width / height < narrow:
    h = min(height, max(1, round(width / narrow)))
  elif width / height > wide:
    w = min(width, max(1, round(height * wide)))
  return (height - h) // 2, (width - w) // 2, h, w


def blur_radius(size: int) -> int:
  """Returns the radius of the blur's kernel in pixels; the kernel has 2 * radius + 1 taps on each axis.

  The formula is that of the authors' code. It gives the paper's 23 x 23 kernel for views of 224 pixels,
  and no blur for views below 20 pixels.

  Args:
    size: side of the view, pixels.
  """
  return int(size / 10 / 2)
