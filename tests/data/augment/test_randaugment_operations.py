"""RandAugment's operations: each against Pillow's, bit for bit, and against its formula."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from randaugment_cases import BINS, GEOMETRIC, IMAGES, images, magnitudes, run

from byolx.data.augment.randaugment import OPERATIONS

LARGE = ["flower", "china", "flower 24", "grey"]


def pixels(strength, side):
  """Whole pixels of a translation, cut towards zero, from the exact fraction of the side."""
  bin_ = round(abs(strength) / (150 / 331) * (BINS - 1))
  return int(np.sign(strength)) * int(Fraction(150 * bin_ * side, 331 * (BINS - 1)))


def is_near_whole(x, within):
  return np.abs(x - np.round(x)) < within


# ------------------------------------------------------------------------------------------------
# Pillow as the oracle, bit for bit
# ------------------------------------------------------------------------------------------------


def pillow(name, view, strength, interpolation):
  """What torchvision's _apply_op does to a PIL image."""
  image = Image.fromarray(view)
  resampling = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
  strength = float(np.float32(strength))

  def affine(*matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling[interpolation])

  def enhance(kind):
    return kind(image).enhance(strength)

  operations = {
    "identity": lambda: image,
    "shear_x": lambda: affine(1, strength, 0, 0, 1, 0),
    "shear_y": lambda: affine(1, 0, 0, strength, 1, 0),
    "translate_x": lambda: affine(1, 0, -pixels(strength, image.width), 0, 1, 0),
    "translate_y": lambda: affine(1, 0, 0, 0, 1, -pixels(strength, image.height)),
    "rotate": lambda: image.rotate(strength, resampling[interpolation]),
    "brightness": lambda: enhance(ImageEnhance.Brightness),
    "color": lambda: enhance(ImageEnhance.Color),
    "contrast": lambda: enhance(ImageEnhance.Contrast),
    "sharpness": lambda: enhance(ImageEnhance.Sharpness),
    "posterize": lambda: ImageOps.posterize(image, int(strength)),
    "solarize": lambda: ImageOps.solarize(image, strength),
    "autocontrast": lambda: ImageOps.autocontrast(image),
    "equalize": lambda: ImageOps.equalize(image),
  }
  assert tuple(operations) == OPERATIONS
  return np.asarray(operations[name]())


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_pillow(name, image):
  view = images()[image]
  for strength in magnitudes(name):
    assert np.array_equal(run(name, view, strength), pillow(name, view, strength, "nearest"))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", [*GEOMETRIC, "translate_x", "translate_y"])
def test_equals_pillow_bilinear(name, image):
  view = images()[image]
  for strength in magnitudes(name)[::3]:
    result = run(name, view, strength, "bilinear")
    assert np.array_equal(result, pillow(name, view, strength, "bilinear"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-1, 1))
def test_equals_pillow_on_noise(name, seed, side, where):
  rng = np.random.default_rng(seed)
  low, high = sorted(rng.integers(0, 256, 2))
  view = rng.integers(low, high + 1, (side, side, 3), np.uint8)
  every = magnitudes(name)
  strength = every[int((where + 1) / 2 * (len(every) - 1))]
  assert np.array_equal(run(name, view, strength), pillow(name, view, strength, "nearest"))


# ------------------------------------------------------------------------------------------------
# The formulas, in numpy
# ------------------------------------------------------------------------------------------------


def luma(view):
  r, g, b = np.moveaxis(view.astype(np.int64), -1, 0)
  return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[..., None]


def smoothed(view):
  """The 3x3 mean with a fivefold middle, rounded; the outermost pixels as they are."""
  x = view.astype(np.int64)
  h, w = x.shape[:2]
  if min(h, w) < 3:
    return x
  total = 4 * x[1:-1, 1:-1]
  for i, j in itertools.product(range(3), range(3)):
    total = total + x[i : h - 2 + i, j : w - 2 + j]
  out = x.copy()
  out[1:-1, 1:-1] = (2 * total + 13) // 26
  return out


DULL = {
  "brightness": lambda view: 0,
  "color": luma,
  "contrast": lambda view: int(luma(view).mean() + 0.5),
  "sharpness": smoothed,
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", DULL)
def test_blends_follow_their_formula(name, image):
  view = images()[image]
  dull = DULL[name](view)
  for strength in magnitudes(name)[::4]:
    exact = dull + strength * (view.astype(np.float64) - dull)
    expected = np.floor(exact.clip(0, 255))
    result = run(name, view, strength).astype(np.int64)
    # float32 may fall to the other side where the exact value is a whole number.
    differs = result != expected
    assert np.all(is_near_whole(exact[differs], 1e-4))
    assert np.all(np.abs(result - expected) <= 1)


@pytest.mark.parametrize("image", IMAGES)
def test_tables_follow_their_formula(image):
  view = images()[image]
  x = view.astype(np.int64)
  for bits in range(4, 9):
    coarse = 2 ** (8 - bits)
    assert np.array_equal(run("posterize", view, bits), x // coarse * coarse)
  for threshold in (0.0, 76.5, 77.0, 178.5, 255.0, 256.0):
    expected = [v if v < threshold else 255 - v for v in x.ravel().tolist()]
    assert run("solarize", view, threshold).ravel().tolist() == expected


@pytest.mark.parametrize("image", IMAGES)
def test_autocontrast_stretches_each_channel(image):
  view = images()[image]
  result = run("autocontrast", view, 0).astype(np.int64)
  for channel in range(3):
    x, y = view[..., channel].astype(np.int64), result[..., channel]
    low, high = x.min(), x.max()
    if low == high:
      assert np.array_equal(y, x)
      continue
    whole, rest = np.divmod((x - low) * 255, high - low)
    # Pillow cuts a float64, which may be just under a whole number.
    assert np.all((y == whole) | ((rest == 0) & (y == whole - 1)))
    assert y.min() == 0
    assert y.max() >= 254


@pytest.mark.parametrize("image", IMAGES)
def test_equalize_ranks_the_pixels(image):
  view = images()[image]
  result = run("equalize", view, 0)
  for channel in range(3):
    x, y = view[..., channel], result[..., channel]
    step = int(np.count_nonzero(x < x.max())) // 255
    for value in np.unique(x):
      darker = int(np.count_nonzero(x < value))
      expected = min(255, (step // 2 + darker) // step) if step else value
      assert np.all(y[x == value] == expected)


def sources(name, strength, side):
  """Where each pixel's centre comes from, (x, y); the first pixel's centre is (0.5, 0.5)."""
  y, x = np.mgrid[:side, :side] + 0.5
  if name == "shear_x":
    return x + strength * y, y
  if name == "shear_y":
    return x, y + strength * x
  angle, middle = np.deg2rad(strength), side / 2
  dx, dy = x - middle, y - middle
  # y points down, so this takes (dx, dy) clockwise: the content turns counter-clockwise.
  return (
    middle + np.cos(angle) * dx - np.sin(angle) * dy,
    middle + np.sin(angle) * dx + np.cos(angle) * dy,
  )


@pytest.mark.parametrize("image", LARGE)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_takes_the_nearest_pixel(name, image):
  view = images()[image]
  side = len(view)
  for strength in magnitudes(name)[::5]:
    x, y = sources(name, strength, side)
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    i, j = (np.floor(c).astype(int).clip(0, side - 1) for c in (y, x))
    expected = np.where(inside[..., None], view[i, j], 0)
    # Pillow counts in 1/65536 of a pixel and adds up, so that a border of pixels may be missed.
    sure = ~(is_near_whole(x, side * 2**-16) | is_near_whole(y, side * 2**-16))
    assert sure.mean() > 0.7
    assert np.array_equal(run(name, view, strength)[sure], expected[sure])


@pytest.mark.parametrize("image", LARGE)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_interpolates_between_pixels(name, image):
  view = images()[image]
  side = len(view)
  for strength in magnitudes(name)[::7]:
    x, y = sources(name, strength, side)
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    i, j = np.floor(y - 0.5).astype(int), np.floor(x - 0.5).astype(int)
    down, right = (y - 0.5 - i)[..., None], (x - 0.5 - j)[..., None]
    exact = np.zeros(view.shape)
    for di, dj in itertools.product((0, 1), (0, 1)):
      weight = (down if di else 1 - down) * (right if dj else 1 - right)
      exact += weight * view[(i + di).clip(0, side - 1), (j + dj).clip(0, side - 1)]
    sure = ~(is_near_whole(x, 1e-6) | is_near_whole(y, 1e-6))
    expected = np.where(inside[..., None], exact, 0)
    error = expected - run(name, view, strength, "bilinear")
    assert np.all((error[sure] > -1e-6) & (error[sure] < 1 + 1e-6))


def test_directions():
  view = np.zeros((9, 9, 3), np.uint8)
  view[4, 6] = 255
  moved = {
    "translate_x": (0.3, (4, 8)),
    "translate_y": (0.3, (6, 6)),
    "shear_x": (0.3, (4, 5)),
    "shear_y": (0.3, (2, 6)),
    "rotate": (90.0, (2, 4)),
  }
  for name, (strength, place) in moved.items():
    result = run(name, view, strength)
    assert tuple(np.argwhere(result[..., 0])[0]) == place, name


@pytest.mark.parametrize("side", [8, 24, 224, 331, 662])
def test_translations_are_cut_to_whole_pixels(side):
  view = np.full((side, side, 3), 9, np.uint8)
  for strength in magnitudes("translate_x"):
    count = abs(pixels(strength, side))
    outside = slice(0, count) if strength > 0 else slice(side - count, side)
    expected = view.copy()
    expected[:, outside] = 0
    assert np.array_equal(run("translate_x", view, strength), expected)
    assert np.array_equal(run("translate_y", view, strength), expected.swapaxes(0, 1))


@pytest.mark.parametrize("share", [-3.0, -1.0, 1.0, 2.5])
def test_nothing_is_left_of_a_view_moved_out(share):
  assert not run("translate_x", images()["white"], share).any()
  assert not run("translate_y", images()["white"], share).any()
