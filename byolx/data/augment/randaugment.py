"""RandAugment, the augmentation of the supervised baselines: N random operations with magnitude M.

RandAugment is from Cubuk et al. 2020 (arXiv:1909.13719). Appendix D.2 of the BYOL paper cites it, but
does not give N, M or the operations. So torchvision's defaults are used here. All random numbers are
drawn first: `draw` samples the `Operations` of one view with the settings in a `RandAugment`. `apply`
is then a pure function of the view and these operations.

Each operation maps a uint8 image to another one. The result equals Pillow's bit for bit, and
torchvision uses Pillow for PIL images (its operations on tensors differ). Operations that
replace each value by one from a table use OpenCV's table look-up, for speed. Shears and rotations call
Pillow.
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
"""Names of the operations; `Operations.index` has indices of this tuple."""

INTERPOLATIONS = ("nearest", "bilinear")

_RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
_LEVELS = np.arange(256)
_BLOCK = 2**14
"""Number of values that `_blend_images` blends at a time; as float32 they fit the processor's cache."""

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclass(frozen=True)
class RandAugment:
  """Settings of RandAugment: number and magnitude of operations; the defaults are torchvision's.

  Attributes:
    operations: number N of operations, at least 1, drawn with replacement and applied in turn.
    magnitude: magnitude M, 0 to bins - 1, not necessarily an integer; 0 gives the weakest form of
      each operation, bins - 1 the strongest.
    bins: number of integer magnitudes, which are 0 to bins - 1; at least 2.
    interpolation: name of the interpolation of shears and rotations, 'nearest' or 'bilinear'.

  Raises:
    ValueError: a field is outside its range.
  """

  operations: int = field(2, "number N of operations, applied in sequence", whole(1))
  magnitude: int | float = field(9.0, "magnitude M of the operations, 0 to bins - 1", at_least(0))
  bins: int = field(31, "number of magnitudes of an operation", whole(2))
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
  """Operations drawn for one view; for a batch of views, each array has a leading axis.

  Attributes:
    index: indices of the operations in `OPERATIONS`, in the order of their application.
    strength: argument of each operation, with its sign. This is the shift in pixels per pixel for a
      shear, a share of the side for a translation, and the angle in degrees for a rotation. It is a
      factor for brightness, color, contrast and sharpness, the number of bits for posterize, and the
      threshold for solarize. It is 0 for an operation without an argument.
  """

  index: Int32[np.ndarray, "*b n"]
  strength: Float32[np.ndarray, "*b n"]


def draw(spec: RandAugment, rng: np.random.Generator) -> Operations:
  """Draws the operations of one view and returns them.

  The 14 operations are equally likely, and so are both signs of their arguments. The generator is
  called once, for 2 N uniform numbers, where N is the number of operations. So with the same seed, the
  operations drawn do not depend on the magnitude, and a larger N only appends operations.

  Args:
    spec: number N and magnitude of the operations.
    rng: random generator of the view.
  """
  u = rng.random((spec.operations, 2))
  index = (u[:, 0] * len(OPERATIONS)).astype(np.int32)
  return Operations(index, _strengths(spec)[(u[:, 1] < 0.5).astype(np.intp), index])


@functools.lru_cache(maxsize=64)
def _strengths(spec: RandAugment) -> Float32[np.ndarray, "2 14"]:
  """Computes the argument of each of the 14 operations, with the sign + in row 0 and - in row 1.

  The values are those of torchvision's `RandAugment._augmentation_space`, at the magnitude in `spec`.
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
  view: UInt8[np.ndarray, "s s 3"], operations: Operations, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "s s 3"]:
  """Applies the drawn operations to a view, one after another.

  Args:
    view: square RGB image 0..255 with any strides; it is not modified.
    operations: operations of this view, not batched.
    interpolation: name of the interpolation of shears and rotations, 'nearest' or 'bilinear'.

  Returns:
    The augmented view; `view` itself if all operations are the identity.

  Raises:
    ValueError: the view is not a square uint8 RGB image, the operations are batched or have an
      unknown index, or the interpolation is unknown.
  """
  side = view.shape[:1]
  if view.dtype != np.uint8 or view.shape != (*side, *side, 3) or side == (0,):
    raise ValueError(
      f"the view is {view.dtype} of shape {view.shape}; expected uint8 of shape (side, side, 3)"
    )
  if operations.index.ndim != 1 or operations.index.shape != operations.strength.shape:
    raise ValueError(
      f"index has the shape {operations.index.shape}, strength {operations.strength.shape};"
      " expected one axis of the same length, the operations of a single view"
    )
  _check_interpolation(interpolation)
  for index, strength in zip(operations.index.tolist(), operations.strength.tolist()):
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
  """Returns the view unchanged."""
  return view


# ------------------------------------------------------------------------------------------------
# Geometry, as in Pillow; pixels from outside the view are 0
# ------------------------------------------------------------------------------------------------


def shear_x(
  view: UInt8[np.ndarray, "h w 3"], shear: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Shears the view horizontally: the pixel at (x, y) is taken from (x + shear * y, y).

  Pixels from outside the view are black. Coordinates are those of Pillow's `Image.transform(AFFINE)`,
  where the centre of the first pixel is (0.5, 0.5). The top edge stays in place, as in the RandAugment
  of torchvision (centre [0, 0]) and in AutoAugment.
  """
  return _affine(view, (1, shear, 0, 0, 1, 0), interpolation)


def shear_y(
  view: UInt8[np.ndarray, "h w 3"], shear: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Shears the view vertically: the pixel at (x, y) is taken from (x, y + shear * x).

  The left edge stays in place. Pixels from outside the view are black.
  """
  return _affine(view, (1, 0, 0, shear, 1, 0), interpolation)


def translate_x(view: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
  """Moves the view to the right by `share` times its width; a negative share moves it to the left.

  The distance is truncated to whole pixels, as in torchvision. The pixels that are left free are black.
  """
  height, width = view.shape[:2]
  out = np.zeros((height, width, 3), np.uint8)
  target, source = _moved(share, width)
  out[:, target] = view[:, source]
  return out


def translate_y(view: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
  """Moves the view down by `share` times its height; a negative share moves it up.

  The distance is truncated to whole pixels, as in torchvision. The pixels that are left free are black.
  """
  height, width = view.shape[:2]
  out = np.zeros((height, width, 3), np.uint8)
  target, source = _moved(share, height)
  out[target] = view[source]
  return out


def rotate(
  view: UInt8[np.ndarray, "h w 3"], degrees: float, interpolation: str = "nearest"
) -> UInt8[np.ndarray, "h w 3"]:
  """Rotates the view counter-clockwise about its centre, as Pillow's `Image.rotate` does.

  Pixels from outside the view are black.
  """
  _check_interpolation(interpolation)
  return np.array(Image.fromarray(view).rotate(degrees, _RESAMPLING[interpolation]))


def _affine(view, matrix, interpolation):
  _check_interpolation(interpolation)
  image = Image.fromarray(view)
  resampling = _RESAMPLING[interpolation]
  return np.array(image.transform(image.size, Image.Transform.AFFINE, matrix, resampling))


def _moved(share, side):
  """Returns two slices, `target` and `source`, for moving a line of `side` pixels.

  The assignment `moved[target] = line[source]` moves the line by `share` times its length.
  """
  # Rounded before the truncation: the float32 share of a move by 5 pixels may give 4.9999998.
  pixels = int(round(share * side, 4))
  kept = max(0, side - abs(pixels))
  first, last = slice(0, kept), slice(side - kept, side)
  return (last, first) if pixels > 0 else (first, last)


# ------------------------------------------------------------------------------------------------
# Blends with a degenerate image, as in Pillow's ImageEnhance: factor 1 gives the view, factor 0 the
# degenerate image.
# ------------------------------------------------------------------------------------------------


def brightness(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """Changes the brightness: multiplies all values by `factor`, clipped and truncated to 0..255."""
  return cv2.LUT(view, _blend(np.float32(0), _LEVELS.astype(np.float32), factor))


def color(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """Changes the saturation: luma + factor * (x - luma), where luma is the grey value of the pixel."""
  return _blend_images(cv2.cvtColor(_luma(view), cv2.COLOR_GRAY2RGB), view, factor)


def contrast(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """Changes the contrast: mean + factor * (x - mean), where `mean` is the mean grey value, rounded."""
  mean = np.float32(int(_luma(view).mean() + 0.5))
  return cv2.LUT(view, _blend(mean, _LEVELS.astype(np.float32), factor))


def sharpness(view: UInt8[np.ndarray, "h w 3"], factor: float) -> UInt8[np.ndarray, "h w 3"]:
  """Changes the sharpness: smooth + factor * (x - smooth), where `smooth` is the smoothed view.

  The smoothing kernel is 3x3, with weight 5/13 in the centre and 1/13 elsewhere. The outermost
  pixels are not smoothed, so they do not change.
  """
  smooth = np.array(view)
  # A sum of bytes divided by 13 is never halfway between two integers: rounding is unambiguous.
  smooth[1:-1, 1:-1] = cv2.filter2D(view, -1, _SMOOTH)[1:-1, 1:-1]
  return _blend_images(smooth, view, factor)


def _blend_images(degenerate, view, factor):
  """Computes degenerate + factor * (view - degenerate) of two uint8 images, as uint8.

  `degenerate` is an image such as the grey or the smoothed view. The function works on a few rows at a
  time, since large temporary arrays in float32 are slow.
  """
  out = np.empty(view.shape, np.uint8)
  rows = 1 + _BLOCK // view[0].size
  for start in range(0, len(view), rows):
    block = slice(start, start + rows)
    out[block] = _blend(
      degenerate[block].astype(np.float32), view[block].astype(np.float32), factor
    )
  return out


def _blend(degenerate, x, factor):
  """Computes degenerate + factor * (x - degenerate) as uint8, clipped and truncated as Pillow does."""
  y = x - degenerate
  y *= np.float32(factor)
  y += degenerate
  return y.clip(0, 255, out=y).astype(np.uint8)


def _luma(view):
  """Returns each pixel's luma (ITU-R 601-2) as in Pillow, (19595 r + 38470 g + 7471 b + 2^15) >> 16."""
  return np.asarray(Image.fromarray(view).convert("L"))


# ------------------------------------------------------------------------------------------------
# Look-up tables, as in Pillow's ImageOps
# ------------------------------------------------------------------------------------------------


def posterize(view: UInt8[np.ndarray, "h w 3"], bits: int) -> UInt8[np.ndarray, "h w 3"]:
  """Keeps the highest `bits` bits of each value, and sets the others to 0.

  Raises:
    ValueError: `bits` is not from 1 to 8.
  """
  if not 1 <= bits <= 8:
    raise ValueError(f"bits is {bits}; expected a whole number from 1 to 8")
  return view & np.uint8(256 - 2 ** (8 - bits))


def solarize(view: UInt8[np.ndarray, "h w 3"], threshold: float) -> UInt8[np.ndarray, "h w 3"]:
  """Inverts bright values: values x of at least `threshold` become 255 - x.

  The smallest magnitude of RandAugment, 0, gives the threshold 255. Even then white becomes black, as
  in torchvision.
  """
  return cv2.LUT(view, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def autocontrast(view: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """Stretches the values of each channel to the range 0..255; a constant channel does not change."""
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
  """Equalises the histogram of each channel over 0..255.

  A value becomes (step // 2 + number of darker pixels) // step, clipped to 255. The step is the
  number of pixels below the brightest value present, divided by 255 and rounded down. If it is 0,
  the channel does not change.
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
