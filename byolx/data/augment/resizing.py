"""Crops and resizes images for training and evaluation: bicubic, with or without antialiasing."""

import functools
import math
import threading
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from byolx.data.augment.distribution import _check_choice

EVALUATION_RULES = ("paper", "reference")
_BLOCK = 8
"""Number of output rows per matrix product: fewer rows need more calls, more multiply more zeros."""


def crop_and_resize(
  image: UInt8[np.ndarray, "h w 3"],
  crop: Int32[np.ndarray, "4"],
  size: int,
  antialias: bool,
  out: UInt8[np.ndarray, "size size 3"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
  """Crops an image and resizes the crop to a square, with bicubic interpolation.

  The kernel is that of Keys with a = -0.5; coordinates have half-pixel centres. Pixels outside the crop
  get no weight, and the other weights are normalised. Without antialiasing, as in the authors' code, the
  result is that of `jax.image.resize(patch, shape, method='cubic', antialias=False)`, clipped and
  rounded, where `patch` holds the pixels of the crop. With antialiasing, the kernel is wider where the
  crop is larger than the result. The result is then that of Pillow's BICUBIC, which also clips and
  rounds between the horizontal and the vertical pass.

  Args:
    image: RGB image 0..255.
    crop: top, left, height and width of the crop in pixels, inside the image.
    size: side of the result in pixels, at least 1.
    antialias: whether to antialias where the crop shrinks.
    out: array for the result; None to allocate an array.

  Returns:
    RGB image 0..255; `out` if it is given.

  Raises:
    ValueError: the crop is empty or extends outside the image, or `size` is not positive.
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
  image: UInt8[np.ndarray, "h w 3"], size: int, resize: int, rule: str, antialias: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
  """Resizes and crops an image for evaluation (appendix C), with bicubic interpolation.

  Args:
    image: RGB image 0..255 of any size.
    size: side of the view in pixels, 224 in the paper.
    resize: length of the resized shorter side in pixels, 256 in the paper; at least `size`.
    rule: name of the rule. 'paper' resizes the shorter side to `resize`, then cuts out the central
      square of side `size`. 'reference', as in the authors' code, cuts out the central square whose
      side is size / resize times the shorter side, then resizes this square to `size`.
    antialias: whether to antialias where the image shrinks; the authors' code never does.

  Returns:
    RGB image 0..255.

  Raises:
    ValueError: `resize` is less than `size`, `size` is not positive, or the rule is unknown.
  """
  _check_choice("rule", rule, EVALUATION_RULES)
  if not 1 <= size <= resize:
    raise ValueError(f"size is {size}, resize is {resize}; expected 1 <= size <= resize")
  height, width = image.shape[:2]
  short = min(height, width)
  if rule == "reference":
    side = max(1, int(size / resize * short))
    crop = ((height - side + 1) // 2, (width - side + 1) // 2, side, side)
    return crop_and_resize(image, np.array(crop, np.int32), size, antialias)
  full = resize * height // short, resize * width // short
  top, left = (round((side - size) / 2) for side in full)
  rows = _resize_weights(height, full[0], top, size, antialias)
  columns = _resize_weights(width, full[1], left, size, antialias)
  return _resize(image, rows, columns, antialias)


def _resize(image, rows, columns, antialias, out=None):
  """Resizes a uint8 image by a matrix for its rows and one for its columns.

  Args:
    image: image to resize.
    rows, columns: matrices from `_resize_weights`.
    antialias: whether to round between the two passes, as Pillow does.
    out: array for the result; None to allocate an array.
  """
  if antialias:  # Pillow's order of the passes, with 8 bits between them
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
  """Clips x to [0, 255] and rounds it to uint8. Ties are rounded up, as in Pillow. x is overwritten."""
  cv2.threshold(x, 0, 0, cv2.THRESH_TOZERO, x)
  return cv2.convertScaleAbs(x, out, beta=1e-4)


def _multiply(blocks, x, slot):
  """Multiplies the banded matrix `blocks` (a tuple of `_Block`) by the matrix x [n, m].

  The result is in the scratch buffer `slot`, which the next call with this slot may overwrite.
  """
  out = _scratch.floats(slot, blocks[-1].stop, x.shape[1])
  for block in blocks:
    np.matmul(block.weights, x[block.low : block.high], out=out[block.start : block.stop])
  return out


class _Scratch(threading.local):
  """Two buffers for each thread. They are reused, because newly allocated memory is slow."""

  _MAX_FLOATS = 2**23  # larger arrays are not kept, which limits the memory of a thread

  def __init__(self):
    self._slots = [np.empty(0, np.float32), np.empty(0, np.float32)]

  def floats(self, slot: int, *shape: int) -> np.ndarray:
    """Returns an uninitialised float32 array from the buffer `slot`, 0 or 1.

    The next call with the same slot may return the same memory.
    """
    count = math.prod(shape)
    if count > self._MAX_FLOATS:
      return np.empty(shape, np.float32)
    if count > len(self._slots[slot]):
      self._slots[slot] = np.empty(count, np.float32)
    return self._slots[slot][:count].reshape(shape)


_scratch = _Scratch()


class _Block(NamedTuple):
  """A few consecutive rows of a banded matrix, without the columns in which all weights are 0.

  Attributes:
    start, stop: range of the rows.
    low, high: range of the columns that may have nonzero weights.
    weights: elements of the matrix in these rows and columns.
  """

  start: int
  stop: int
  low: int
  high: int
  weights: Float32[np.ndarray, "rows columns"]


@functools.lru_cache(maxsize=2048)
def _resize_weights(
  source: int, target: int, first: int, count: int, antialias: bool
) -> tuple[_Block, ...]:
  """Computes the matrix that resizes a line of `source` pixels to `target` pixels.

  Only the rows `first` to `first + count - 1` are computed, one row for each pixel of the resized line.

  Returns:
    The matrix as blocks of consecutive rows.
  """
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
  """Evaluates Keys' cubic kernel (1981), with a = -0.5 (Catmull-Rom), at distances x >= 0."""
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))
