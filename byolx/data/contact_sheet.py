"""Draws contact sheets: one picture with several images and their augmented views."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

_SMALLEST_CELL = 96
_GAP = 6
_HEADER = 24
_PAPER = 255
_INK = (70, 70, 70)


def draw_sheet(
  originals: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  pairs: Sequence[Sequence[tuple[UInt8[np.ndarray, "_ _ 3"], ...]]],
) -> UInt8[np.ndarray, "height width 3"]:
  """Draws a contact sheet: one row per image, with the original and then its pairs of views.

  Views of less than 96 pixels are enlarged to 96 or more by an integer factor, without interpolation, so
  that each pixel is visible. Originals keep their aspect ratio. They are resized to fit into a square of
  the size of the drawn views.

  Args:
    originals: RGB images 0..255 of any size.
    pairs: tuples (view 1, view 2) or (view,) of each original, the same number of each. All views are
      square RGB images 0..255 of one size.

  Returns:
    RGB image 0..255 with a line of labels above the columns.

  Raises:
    ValueError: there is no original or view, or the numbers or sizes of the views differ.
  """
  views = [[view for pair in row for view in pair] for row in pairs]
  shapes = {view.shape for row in views for view in row}
  if not originals or len(originals) != len(pairs) or len({len(row) for row in views}) != 1:
    raise ValueError(
      f"{len(originals)} originals and rows of {[len(row) for row in pairs]} pairs; expected one"
      " row per original, with equally many pairs"
    )
  if len(shapes) != 1 or len(set(min(shapes)[:2])) != 1:
    raise ValueError(f"the views have shapes {sorted(shapes)}; expected square ones of one size")
  size = min(shapes)[0]
  factor = -(-_SMALLEST_CELL // size)
  cell = factor * size
  per_pair = len(pairs[0][0])
  names = ["view"] if per_pair == 1 else [f"view {number}" for number in range(1, per_pair + 1)]
  labels = ["original"] + names * len(pairs[0])
  # A wider gap before each pair.
  lefts = [
    _GAP + i * (cell + _GAP) + _GAP * ((i + per_pair - 1) // per_pair) for i in range(len(labels))
  ]
  height = _HEADER + len(originals) * (cell + _GAP)
  sheet = np.full((height, lefts[-1] + cell + _GAP, 3), _PAPER, np.uint8)
  for label, left in zip(labels, lefts, strict=True):
    _write(sheet, label, left, cell)
  for i, (original, row) in enumerate(zip(originals, views, strict=True)):
    top = _HEADER + i * (cell + _GAP)
    tiles = [_fit(original, cell), *(_enlarge(view, factor) for view in row)]
    for tile, left in zip(tiles, lefts, strict=True):
      sheet[top : top + cell, left : left + cell] = tile
  return sheet


def _enlarge(image, factor):
  return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _fit(image, cell):
  """Resizes an image and centres it in a white square of side `cell` pixels. Returns the square."""
  height, width = image.shape[:2]
  scale = cell / max(height, width)
  if scale >= 1:
    image = _enlarge(image, int(scale))
  else:
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
  height, width = image.shape[:2]
  top, left = (cell - height) // 2, (cell - width) // 2
  tile = np.full((cell, cell, 3), _PAPER, np.uint8)
  tile[top : top + height, left : left + width] = image
  return tile


def _write(sheet, label, left, cell):
  """Writes `label` into the top line of `sheet`, centred above one column.

  The column starts at x = `left` and is `cell` pixels wide.
  """
  font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.45
  (width, _), _ = cv2.getTextSize(label, font, scale, 1)
  at = (left + (cell - width) // 2, _HEADER - 8)
  cv2.putText(sheet, label, at, font, scale, _INK, 1, cv2.LINE_AA)
