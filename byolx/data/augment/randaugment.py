"""RandAugment, the augmentation of the supervised baselines: N random operations of one magnitude.

Cubuk et al. 2020 (arXiv:1909.13719), which appendix D.2 of the paper names without saying N, M or
the operations; those here are torchvision's defaults. Randomness is data, as in `augment`: `draw`
turns a `RandAugment` into `Operations`, every random number of one view, and `apply` is a pure
function of a view and those.

Every operation maps a uint8 image to a new one and equals Pillow's, bit for bit, which is what
torchvision calls for a PIL image (for a tensor it has arithmetic of its own). What depends on one
value only is OpenCV's look-up table here, some times faster than Pillow's way; shears and rotations
are Pillow's own.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from byolx.core.fields import at_least, field, one_of, whole

OPERATIONS = (
  "identity",
  "shear_x",
  "shear_y",
  "translate_x",
  "translate_y",
  "rotate",
  "brightness",
  "color",
  "contrast",
  "sharpness",
  "posterize",
  "solarize",
  "autocontrast",
  "equalize",
)
"""The operations, as numbered in `Operations.index`."""

INTERPOLATIONS = ("nearest", "bilinear")

_RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
_LEVELS = np.arange(256)
_BLOCK = 2**14
"""Values of an image in float32 at a time: few enough for a cache, and for memory used before."""

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclass(frozen=True)
class RandAugment:
  """How strong, and how many, operations a view gets; the defaults are torchvision's.

  Attributes:
    operations: N, at least 1: how many are applied one after another, drawn with replacement.
    magnitude: M, in bins: from 0 to bins - 1. Each operation's range is cut into linspace(0,
      largest, bins); M need not be whole.
    bins: at least 2.
    interpolation: of shears and rotations, 'nearest' or 'bilinear', for `apply`.

  Raises:
    ValueError: if a field is outside its range.
  """

  operations: int = field(2, "N, operations one after another", whole(1))
  magnitude: int | float = field(9.0, "M, strength in bins", at_least(0))
  bins: int = field(31, "number of strengths, from 0 to the largest", whole(2))
  interpolation: str = field(
    "nearest", "interpolation of shears and rotations", one_of("nearest", "bilinear")
  )

  def __post_init__(self):
    if self.operations < 1:
      raise ValueError(f"operations is {self.operations}; expected at least 1")
    if self.bins < 2:
      raise ValueError(f"bins is {self.bins}; expected at least 2")
    if not 0 <= self.magnitude <= self.bins - 1:
      raise ValueError(
        f"magnitude is {self.magnitude}; expected a number from 0 to bins - 1 = {self.bins - 1}"
      )
    _check_interpolation(self.interpolation)


class Operations(NamedTuple):
  """Every random number of one view, as numpy arrays; a batch of views has a leading axis.

  Attributes:
    index: which operation, into `OPERATIONS`, in the order in which they are applied.
    strength: the operation's own argument with its sign: shear in pixels per pixel, translation as
      a share of the side, rotation in degrees, factors of brightness, color, contrast and
      sharpness, bits of posterize, threshold of solarize; 0 for those without an argument.
  """

  index: Int32[np.ndarray, "*b n"]
  strength: Float32[np.ndarray, "*b n"]


def draw(spec: RandAugment, rng: np.random.Generator) -> Operations:
  """Draws the operations of one view: each of the 14 equally likely, each sign as well.

  The generator is called once, for 2 N uniforms whatever comes out: the magnitude does not change
  which operations a seed gives, and a larger N only adds operations.
  """
  u = rng.random((spec.operations, 2))
  index = (u[:, 0] * len(OPERATIONS)).astype(np.int32)
  return Operations(index, _strengths(spec)[(u[:, 1] < 0.5).astype(np.intp), index])


@functools.lru_cache(maxsize=64)
def _strengths(spec: RandAugment) -> Float32[np.ndarray, "2 14"]:
  """The argument of every operation, with the sign + and with the sign -, where it has one.

  torchvision's `RandAugment._augmentation_space`.
  """
  m = spec.magnitude / (spec.bins - 1)
  table = np.empty((2, len(OPERATIONS)), np.float32)
  for row, signed in zip(table, (m, -m)):
    row[:] = [
      {
        "identity": 0.0,
        "shear_x": 0.3 * signed,
        "shear_y": 0.3 * signed,
        "translate_x": 150 / 331 * signed,
        "translate_y": 150 / 331 * signed,
        "rotate": 30 * signed,
        "brightness": 1 + 0.9 * signed,
        "color": 1 + 0.9 * signed,
        "contrast": 1 + 0.9 * signed,
        "sharpness": 1 + 0.9 * signed,
        "posterize": 8 - round(spec.magnitude / ((spec.bins - 1) / 4)),
        "solarize": 255 * (1 - m),
        "autocontrast": 0.0,
        "equalize": 0.0,
      }[name]
      for name in OPERATIONS
    ]
  table.flags.writeable = False
  return table


def apply(
  view: UInt8[np.ndarray, "s s 3"], drawn: Operations, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "s s 3"]:
  """Applies the operations to a view, in their order.

  Args:
    view: uint8, of any strides; not changed, and returned itself if only identities are drawn.
    drawn: of this view, not batched.
    interpolation: that of the `RandAugment` behind the operations.

  Raises:
    ValueError: if the view is not a square RGB image of bytes, if the operations are a batch or
      have unknown numbers, or the interpolation is unknown.
  """
  side = view.shape[:1]
  if view.dtype != np.uint8 or view.shape != (*side, *side, 3) or side == (0,):
    raise ValueError(
      f"the view is {view.dtype} of shape {view.shape}; expected uint8 of shape (side, side, 3)"
    )
  if drawn.index.ndim != 1 or drawn.index.shape != drawn.strength.shape:
    raise ValueError(
      f"index has the shape {drawn.index.shape}, strength {drawn.strength.shape}; expected one"
      " axis of the same length, the operations of a single view"
    )
  _check_interpolation(interpolation)
  for index, strength in zip(drawn.index.tolist(), drawn.strength.tolist()):
    if not 0 <= index < len(OPERATIONS):
      choices = ", ".join(f"{i} {name}" for i, name in enumerate(OPERATIONS))
      raise ValueError(f"index has an operation {index}; expected one of {choices}")
    name = OPERATIONS[index]
    if name in _GEOMETRIC:
      view = _GEOMETRIC[name](view, strength, interpolation)
    elif name in _WITH_STRENGTH:
      view = _WITH_STRENGTH[name](view, strength)
    else:
      view = _PLAIN[name](view)
  return view


def identity(view: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """The view itself."""
  return view


# ------------------------------------------------------------------------------------------------
# Geometry: Pillow's, with zeros where the result reaches outside the view
# ------------------------------------------------------------------------------------------------


def shear_x(
  view: UInt8[np.ndarray, "h w 3"], shear: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Takes the pixel at (x, y) from (x + shear * y, y): the top edge stays where it is.

  Coordinates are those of Pillow's `Image.transform(AFFINE)`, in which the centre of the first
  pixel is (0.5, 0.5). That the upper left corner is fixed, not the centre as in a rotation, is
  torchvision's RandAugment (centre [0, 0]) as it was AutoAugment's.
  """
  return _affine(view, (1, shear, 0, 0, 1, 0), interpolation)


def shear_y(
  view: UInt8[np.ndarray, "h w 3"], shear: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Takes the pixel at (x, y) from (x, y + shear * x): the left edge stays; see `shear_x`."""
  return _affine(view, (1, 0, 0, shear, 1, 0), interpolation)


def translate_x(view: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
  """Moves the view to the right by a share of its width, cut to whole pixels as torchvision's."""
  height, width = view.shape[:2]
  out = np.zeros((height, width, 3), np.uint8)
  to, source = _moved(share, width)
  out[:, to] = view[:, source]
  return out


def translate_y(view: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
  """Moves the view down by a share of its height, cut to whole pixels as torchvision's."""
  height, width = view.shape[:2]
  out = np.zeros((height, width, 3), np.uint8)
  to, source = _moved(share, height)
  out[to] = view[source]
  return out


def rotate(
  view: UInt8[np.ndarray, "h w 3"], degrees: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Rotates counter-clockwise about (w / 2, h / 2), the view's centre: `Image.rotate`."""
  _check_interpolation(interpolation)
  return np.array(Image.fromarray(view).rotate(degrees, _RESAMPLING[interpolation]))


def _affine(view, matrix, interpolation):
  _check_interpolation(interpolation)
  image = Image.fromarray(view)
  resampling = _RESAMPLING[interpolation]
  return np.array(image.transform(image.size, Image.Transform.AFFINE, matrix, resampling))


def _moved(share, side):
  """Where the pixels of a line of `side` pixels go to, and which do."""
  # Rounded first: a share in float32 of what is meant to be 5 pixels may be 4.9999998.
  pixels = int(round(share * side, 4))
  kept = max(0, side - abs(pixels))
  first, last = slice(0, kept), slice(side - kept, side)
  return (last, first) if pixels > 0 else (first, last)


# ------------------------------------------------------------------------------------------------
# Blends with a duller image: Pillow's ImageEnhance. A factor of 1 is the view, 0 the duller image.
# ------------------------------------------------------------------------------------------------


def brightness(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """factor * x, clipped and cut to whole grey levels: a blend with black."""
  return cv2.LUT(view, _blend(np.float32(0), _LEVELS.astype(np.float32), factor))


def color(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """luma + factor * (x - luma), with each pixel's luma: a blend with the grey view."""
  return _blend_images(cv2.cvtColor(_luma(view), cv2.COLOR_GRAY2RGB), view, factor)


def contrast(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """mean + factor * (x - mean), with the whole view's mean luma, rounded: a blend with a grey."""
  mean = np.float32(int(_luma(view).mean() + 0.5))
  return cv2.LUT(view, _blend(mean, _LEVELS.astype(np.float32), factor))


def sharpness(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """smooth + factor * (x - smooth): a blend with the smoothed view.

  The kernel is 3x3 with weights of 5/13 in the middle and 1/13 around it. The outermost pixels are
  not smoothed, so they do not change.
  """
  smooth = np.array(view)
  # Sums of bytes over 13 never lie halfway between two bytes, so that rounding has one answer.
  smooth[1:-1, 1:-1] = cv2.filter2D(view, -1, _SMOOTH)[1:-1, 1:-1]
  return _blend_images(smooth, view, factor)


def _blend_images(dull, view, factor):
  """`_blend` of two uint8 images, some rows at a time: fresh pages cost more than the arithmetic."""
  out = np.empty(view.shape, np.uint8)
  rows = 1 + _BLOCK // view[0].size
  for start in range(0, len(view), rows):
    some = slice(start, start + rows)
    out[some] = _blend(dull[some].astype(np.float32), view[some].astype(np.float32), factor)
  return out


def _blend(dull, x, factor):
  """dull + factor * (x - dull) in float32, clipped and cut to uint8; Pillow's `Image.blend`."""
  y = x - dull
  y *= np.float32(factor)
  y += dull
  return y.clip(0, 255, out=y).astype(np.uint8)


def _luma(view):
  """(19595 r + 38470 g + 7471 b + 2^15) >> 16, uint8: ITU-R 601-2 as Pillow rounds it."""
  return np.asarray(Image.fromarray(view).convert("L"))


# ------------------------------------------------------------------------------------------------
# Look-up tables: Pillow's ImageOps
# ------------------------------------------------------------------------------------------------


def posterize(view: UInt8[np.ndarray, "h w 3"], bits: int) -> UInt8[np.ndarray, "h w 3"]:
  """Keeps the highest `bits` bits of every value.

  Raises:
    ValueError: if `bits` is not from 1 to 8.
  """
  if not 1 <= bits <= 8:
    raise ValueError(f"bits is {bits}; expected a whole number from 1 to 8")
  return view & np.uint8(256 - 2 ** (8 - bits))


def solarize(view: UInt8[np.ndarray, "h w 3"], threshold: float) -> UInt8[np.ndarray, "h w 3"]:
  """x where x < threshold, and 255 - x elsewhere.

  The threshold of magnitude 0 is 255, at which white becomes black: torchvision's, too, is not
  the identity there.
  """
  return cv2.LUT(view, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def autocontrast(view: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """Stretches each channel's range to 0 .. 255; a channel of one value stays as it is."""
  table = np.empty((1, 256, 3), np.uint8)
  for channel, column in enumerate(cv2.split(view)):
    low, high, _, _ = cv2.minMaxLoc(column)
    if low < high:
      scale = 255.0 / (high - low)
      stretched = (_LEVELS * scale + -low * scale).clip(0, 255)
    else:
      stretched = _LEVELS
    table[0, :, channel] = stretched
  return cv2.LUT(view, table)


def equalize(view: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """Spreads each channel's values evenly over 0 .. 255.

  A value becomes (step // 2 + the number of darker pixels) // step, at most 255, where 255 steps
  are the pixels that are not of the brightest value. Without such pixels, or with fewer than 255,
  the channel stays as it is.
  """
  table = np.empty((1, 256, 3), np.uint8)
  for channel in range(3):
    counts = cv2.calcHist([view], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if step:
      darker = np.cumsum(counts) - counts
      table[0, :, channel] = ((step // 2 + darker) // step).clip(0, 255)
    else:
      table[0, :, channel] = _LEVELS
  return cv2.LUT(view, table)


_PLAIN = {"identity": identity, "autocontrast": autocontrast, "equalize": equalize}
_GEOMETRIC = {"shear_x": shear_x, "shear_y": shear_y, "rotate": rotate}
_WITH_STRENGTH = {
  "translate_x": translate_x,
  "translate_y": translate_y,
  "brightness": brightness,
  "color": color,
  "contrast": contrast,
  "sharpness": sharpness,
  "posterize": lambda view, bits: posterize(view, round(bits)),
  "solarize": solarize,
}


def _check_interpolation(interpolation):
  if interpolation not in INTERPOLATIONS:
    raise ValueError(
      f"interpolation is {interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
    )
