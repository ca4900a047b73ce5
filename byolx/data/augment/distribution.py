"""Views: which random numbers a view takes, how its crop is cut, and the view used for evaluation.

Appendix C and Table 6 of the paper. Randomness is data: `draw` turns a `ViewSpec` (one of the
paper's distributions T and T') into a `Draws`, every random number of one view, and everything
after it is a pure function. `crop_and_resize` cuts the view out of the image; the colour work then
has two bodies that agree to one grey level, `on_host.apply_host` (numpy and OpenCV) and
`on_device.apply_device` (jnp, inside the jitted step).
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
  """Raises ValueError unless `rule` is one of `BRIGHTNESS_RULES`."""
  _check_choice("brightness_rule", rule, BRIGHTNESS_RULES)


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class ViewSpec:
  """One distribution of views; the defaults are T of Table 6.

  T' differs in two fields: `ViewsSpec.view2`.

  Attributes:
    crop_probability: otherwise the whole image is the crop.
    crop_area: range of the crop's share of the image's area, drawn uniformly.
    crop_aspect: range of the crop's width / height, drawn uniformly in its logarithm.
    crop_rule: 'one_draw' clamps the drawn sides to the image; 'retry' draws up to ten times until
      the crop fits, then takes the largest central crop with an allowed aspect.
    flip_probability: of mirroring left and right.
    jitter_probability: of the four operations below, in random order.
    brightness, contrast, saturation: in [0, 1]. Saturation and contrast are multiplied by
      U(1 - m, 1 + m), as is brightness if its rule is 'multiplicative'; 'additive' adds U(-m, m).
    hue: in [0, 0.5], the largest shift as a share of the colour circle.
    grayscale_probability: of dropping the colours.
    blur_probability: of a Gaussian blur whose sigma, in pixels, is uniform in `blur_sigma`.
    solarise_probability: of x -> x if x < 0.5 else 1 - x.
    brightness_rule: 'additive' as the reference, or 'multiplicative'.
    randaugment: what follows all of these, on the host (appendix D.2); None: nothing.

  Raises:
    ValueError: if a field is outside its range.
  """

  crop_probability: float = field(1.0, "share of images that are cropped", between(0, 1))
  crop_area: tuple[float, float] = field(
    (0.08, 1.0), "area of the crop as a share of the image's", interval(1e-4, 1, "the whole image")
  )
  crop_aspect: tuple[float, float] = field(
    (3 / 4, 4 / 3), "width over height, drawn on a log scale", interval(0.01, 100)
  )
  flip_probability: float = field(0.5, "left-right flip", between(0, 1))
  jitter_probability: float = field(
    0.8, "colour jitter, its four operations in random order", between(0, 1)
  )
  brightness: float = field(0.4, "largest brightness change", between(0, 1))
  contrast: float = field(0.4, "largest contrast change", between(0, 1))
  saturation: float = field(0.2, "largest saturation change", between(0, 1))
  hue: float = field(0.1, "largest hue shift, in turns", between(0, 0.5))
  grayscale_probability: float = field(0.2, "colour dropping", between(0, 1))
  blur_probability: float = field(1.0, "Gaussian blur", between(0, 1))
  blur_sigma: tuple[float, float] = field(
    (0.1, 2.0), "its standard deviation, in pixels", interval(1e-3, 100)
  )
  solarise_probability: float = field(0.0, "solarisation", between(0, 1))
  crop_rule: str = "one_draw"
  brightness_rule: str = "additive"
  randaugment: RandAugment | None = None

  def __post_init__(self):
    for name, declared in fields_of(ViewSpec).items():
      value = getattr(self, name)
      if wanted := declared.check(value):
        raise ValueError(f"{name} is {value}; expected {wanted}")
    _check_choice("crop_rule", self.crop_rule, CROP_RULES)
    check_brightness_rule(self.brightness_rule)


@dataclass(frozen=True)
class ViewsSpec:
  """The config group `views`: both distributions, and what they have in common (Table 6)."""

  size: int = field(224, "side of a view, pixels", at_least(4), encoder=True)
  crop_rule: str = field(
    ViewSpec.crop_rule,
    "one draw clamped to the image, or ten tries as torchvision",
    one_of(*CROP_RULES),
  )
  antialias: bool = field(False, "antialias when a crop is made smaller")
  brightness_rule: str = field(
    ViewSpec.brightness_rule, "x + d, or x * (1 + d) as torch ports", one_of(*BRIGHTNESS_RULES)
  )
  placement: str = field(
    "host", "where colours are worked: input threads or the step", one_of("host", "device")
  )
  mean: tuple[float, float, float] = field(
    (0.485, 0.456, 0.406), "subtracted after augmentation", each(between(0, 1), 3), encoder=True
  )
  std: tuple[float, float, float] = field(
    (0.229, 0.224, 0.225), "divided by after augmentation", each(above(0), 3), encoder=True
  )
  view1: ViewSpec = ViewSpec()
  view2: ViewSpec = ViewSpec(blur_probability=0.1, solarise_probability=0.2)


class Draws(NamedTuple):
  """Every random number of one view, as numpy arrays; a batch of views has a leading axis.

  Attributes:
    crop: top, left, height, width, in pixels of the source image.
    flip: whether the view is mirrored.
    jitter: whether the four colour operations below apply.
    order: their order, a permutation of `BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`.
    brightness: what is added, or the factor, as `ViewSpec.brightness_rule` says.
    contrast, saturation: factors.
    hue: shift, as a share of the colour circle.
    grayscale: whether colours are dropped.
    sigma: of the blur, in pixels; 0 means no blur.
    solarise: whether values of at least 0.5 are inverted.
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
  """Draws one view of a height x width image from `spec`.

  The generator is called once and for the same number of values whatever comes out, so changing
  one probability or intensity of a spec leaves every other draw of the same seed as it was.

  Raises:
    ValueError: if the image is empty.
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
  """A crop's (top, left, height, width) from uniforms; one pair of `u_shapes` per try."""
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
  """Half the width of the blur's kernel, which has 2 * radius + 1 taps: 11 for a 224-pixel view.

  The reference's rule, and the paper's 23 x 23. Views under 20 pixels have one tap: no blur.
  """
  return int(size / 10 / 2)
