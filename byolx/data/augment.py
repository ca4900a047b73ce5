"""Views: which random numbers a view takes, how its crop is cut, and the view used for evaluation.

Appendix C and Table 6 of the paper. Randomness is data: `draw` turns a `ViewSpec` (one of the
paper's distributions T and T') into a `Draws`, every random number of one view, and everything
after it is a pure function. `crop_and_resize` cuts the view out of the image; the colour work then
has two bodies that agree to one grey level, `augment_host.apply_host` (numpy and OpenCV) and
`augment_device.apply_device` (jnp, inside the jitted step).
"""

import functools
import math
import threading
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from byolx.data.randaugment import RandAugment

CROP_RULES = ("one_draw", "retry")
BRIGHTNESS_RULES = ("additive", "multiplicative")
EVALUATION_RULES = ("paper", "reference")

# The colour jitter's operations, as numbered in `Draws.order`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_TRIES = {"one_draw": 1, "retry": 10}
_BLOCK = 8
"""Rows of a resize per matrix product: fewer are many small calls, more are many zeros."""


@dataclass(frozen=True)
class ViewSpec:
  """One distribution of views; the defaults are T of Table 6.

  T' differs in two fields: `ViewSpec(blur_probability=0.1, solarise_probability=0.2)`.

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

  crop_probability: float = 1.0
  crop_area: tuple[float, float] = (0.08, 1.0)
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  crop_rule: str = "one_draw"
  flip_probability: float = 0.5
  jitter_probability: float = 0.8
  brightness: float = 0.4
  contrast: float = 0.4
  saturation: float = 0.2
  hue: float = 0.1
  grayscale_probability: float = 0.2
  blur_probability: float = 1.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarise_probability: float = 0.0
  brightness_rule: str = "additive"
  randaugment: RandAugment | None = None

  def __post_init__(self):
    bounded = {
      "crop_probability": (self.crop_probability, 1),
      "flip_probability": (self.flip_probability, 1),
      "jitter_probability": (self.jitter_probability, 1),
      "brightness": (self.brightness, 1),
      "contrast": (self.contrast, 1),
      "saturation": (self.saturation, 1),
      "hue": (self.hue, 0.5),
      "grayscale_probability": (self.grayscale_probability, 1),
      "blur_probability": (self.blur_probability, 1),
      "solarise_probability": (self.solarise_probability, 1),
    }
    for name, (value, most) in bounded.items():
      if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; expected a number from 0 to {most}")
    ranges = {
      "crop_area": (self.crop_area, 1),
      "crop_aspect": (self.crop_aspect, math.inf),
      "blur_sigma": (self.blur_sigma, math.inf),
    }
    for name, ((low, high), most) in ranges.items():
      if not (0 < low <= high <= most and math.isfinite(high)):
        raise ValueError(f"{name} is {(low, high)}; expected 0 < low <= high <= {most}")
    _check_choice("crop_rule", self.crop_rule, CROP_RULES)
    check_brightness_rule(self.brightness_rule)


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


def crop_and_resize(
  image: UInt8[np.ndarray, "h w 3"],
  crop: Int32[np.ndarray, "4"],
  size: int,
  antialias: bool,
  out: UInt8[np.ndarray, "size size 3"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
  """Cuts `crop` (top, left, height, width) out of `image` and resizes it, bicubic, to `size`.

  Keys' kernel with a = -0.5 and half-pixel centres; weights that reach outside the patch are
  dropped and the rest normalised. Without antialiasing, as the reference, this is
  `jax.image.resize(patch, method='cubic', antialias=False)`, clipped and rounded. With it, the
  kernel widens where the patch shrinks and this is Pillow's BICUBIC, which also clips and rounds
  between the horizontal and the vertical pass. The result is written to `out`, if that is given.

  Raises:
    ValueError: if the crop is empty or reaches outside the image, or `size` is not positive.
  """
  top, left, height, width = crop.tolist()
  inside = 0 <= top < top + height <= image.shape[0] and 0 <= left < left + width <= image.shape[1]
  if not inside or size < 1:
    raise ValueError(
      f"crop (top, left, height, width) = {(top, left, height, width)} to size {size}; expected a"
      f" part of the {image.shape[0]}x{image.shape[1]} image, and a positive size"
    )
  rows = _resize_weights(height, size, 0, size, antialias)
  columns = _resize_weights(width, size, 0, size, antialias)
  return _resize(image[top : top + height, left : left + width], rows, columns, antialias, out)


def evaluation_view(
  image: UInt8[np.ndarray, "h w 3"], size: int, resize: int, rule: str
) -> UInt8[np.ndarray, "size size 3"]:
  """The one view of an image that evaluation uses (appendix C).

  Args:
    image: any size.
    size: the view's side, 224 in the paper.
    resize: 256 in the paper, at least `size`.
    rule: 'paper' resizes the shorter side to `resize`, bicubic and antialiased, then takes the
      central `size` x `size`. 'reference' takes the central square of size / resize of the shorter
      side, then resizes it to `size`, bicubic without antialiasing.

  Raises:
    ValueError: if `resize` is less than `size`, or the rule is unknown.
  """
  _check_choice("rule", rule, EVALUATION_RULES)
  if not 1 <= size <= resize:
    raise ValueError(f"size is {size}, resize is {resize}; expected 1 <= size <= resize")
  height, width = image.shape[:2]
  short = min(height, width)
  if rule == "reference":
    side = max(1, int(size / resize * short))
    crop = ((height - side + 1) // 2, (width - side + 1) // 2, side, side)
    return crop_and_resize(image, np.array(crop, np.int32), size, antialias=False)
  full = resize * height // short, resize * width // short
  top, left = (round((side - size) / 2) for side in full)
  rows = _resize_weights(height, full[0], top, size, antialias=True)
  columns = _resize_weights(width, full[1], left, size, antialias=True)
  return _resize(image, rows, columns, antialias=True)


def blur_radius(size: int) -> int:
  """Half the width of the blur's kernel, which has 2 * radius + 1 taps: 11 for a 224-pixel view.

  The reference's rule, and the paper's 23 x 23. Views under 20 pixels have one tap: no blur.
  """
  return int(size / 10 / 2)


def _resize(image, rows, columns, antialias, out=None):
  """Applies two sets of weights from `_resize_weights` to a uint8 image, into `out` if given."""
  if antialias:  # Pillow's order, which keeps 8 bits between the passes
    first, second, image = columns, rows, cv2.transpose(image)
  else:
    first, second = rows, columns
  across, along = image.shape[:2]
  x = _scratch.floats(0, across, 3 * along)
  np.copyto(x.reshape(image.shape), image)
  x = _multiply(first, x, slot=1)
  if antialias:
    np.copyto(x, _to_uint8(x))
  turned = _scratch.floats(0, along, len(x), 3)
  cv2.transpose(x.reshape(len(x), along, 3), turned)
  x = _multiply(second, turned.reshape(along, -1), slot=1)
  if antialias:
    return _to_uint8(x, None if out is None else out.reshape(x.shape)).reshape(len(x), -1, 3)
  return cv2.transpose(_to_uint8(x).reshape(len(x), -1, 3), out)


def _to_uint8(x, out=None):
  """Clips to [0, 255] and rounds; ties go up, as in Pillow. Overwrites x."""
  cv2.threshold(x, 0, 0, cv2.THRESH_TOZERO, x)
  return cv2.convertScaleAbs(x, out, beta=1e-4)


def _multiply(blocks, x, slot):
  """The banded matrix times x [n, m]: blocks of rows, each with the columns that it reaches."""
  out = _scratch.floats(slot, blocks[-1].stop, x.shape[1])
  for block in blocks:
    np.matmul(block.weights, x[block.low : block.high], out=out[block.start : block.stop])
  return out


class _Scratch(threading.local):
  """Memory of this thread that is used again: fresh pages cost as much as the arithmetic."""

  _MOST = 2**23  # floats; a larger image gets memory of its own, which is given back

  def __init__(self):
    self._slots = [np.empty(0, np.float32), np.empty(0, np.float32)]

  def floats(self, slot: int, *shape: int) -> np.ndarray:
    """An array with any content, valid until the slot is asked for again."""
    count = math.prod(shape)
    if count > self._MOST:
      return np.empty(shape, np.float32)
    if count > len(self._slots[slot]):
      self._slots[slot] = np.empty(count, np.float32)
    return self._slots[slot][:count].reshape(shape)


_scratch = _Scratch()


class _Block(NamedTuple):
  """Rows start:stop of a banded matrix, of which only the columns low:high are not zero."""

  start: int
  stop: int
  low: int
  high: int
  weights: Float32[np.ndarray, "rows columns"]


@functools.lru_cache(maxsize=2048)
def _resize_weights(
  source: int, target: int, first: int, count: int, antialias: bool
) -> tuple[_Block, ...]:
  """The matrix that resizes a line of `source` pixels to `target`, outputs first:first+count."""
  scale = source / target
  stretch = max(scale, 1.0) if antialias else 1.0
  centre = (np.arange(first, first + count) + 0.5) * scale - 0.5
  taps = np.arange(math.ceil(4 * stretch) + 1)
  pixel = np.ceil(centre - 2 * stretch).astype(np.int64)[:, None] + taps
  weights = _keys(np.abs(centre[:, None] - pixel) / stretch)
  inside = (pixel >= 0) & (pixel < source)
  weights /= weights.sum(axis=1, keepdims=True, where=inside)
  lows = np.maximum(pixel[::_BLOCK, 0], 0)
  column = pixel - np.repeat(lows, _BLOCK)[:count, None]
  row = np.broadcast_to(np.arange(count)[:, None], pixel.shape)
  banded = np.zeros((count, int(column.max()) + 1), np.float32)
  banded[row[inside], column[inside]] = weights[inside]
  blocks = []
  for start, low in zip(range(0, count, _BLOCK), lows.tolist()):
    rows = banded[start : start + _BLOCK, : source - low]
    blocks.append(_Block(start, start + len(rows), low, low + rows.shape[1], rows))
  return tuple(blocks)


def _keys(x):
  """Keys' cubic convolution kernel with a = -0.5 (Catmull-Rom), for distances x >= 0."""
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def check_brightness_rule(rule: str) -> None:
  """Raises ValueError unless `rule` is one of `BRIGHTNESS_RULES`."""
  _check_choice("brightness_rule", rule, BRIGHTNESS_RULES)


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
