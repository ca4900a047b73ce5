"""Views: specs, draws, crops and the evaluation view, against the paper's numbers and Pillow."""

import dataclasses
import itertools
import math
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits, load_sample_image

from byolx.data import augment
from byolx.data.augment import Draws, ViewSpec, crop_and_resize, draw, evaluation_view

T = ViewSpec()
T_PRIME = ViewSpec(blur_probability=0.1, solarise_probability=0.2)


def many(spec, n=3000, height=375, width=500, seed=0):
  """n draws of one generator, each field stacked."""
  rng = np.random.default_rng(seed)
  return Draws(*map(np.stack, zip(*(draw(spec, rng, height, width) for _ in range(n)))))


def crop(*box):
  return np.array(box, np.int32)


@pytest.fixture(scope="module")
def photo():
  return np.ascontiguousarray(load_sample_image("flower.jpg"))


@pytest.fixture(scope="module")
def noise():
  return np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def digit():
  grey = np.round(load_digits().images[3] * 255 / 16).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


# ------------------------------------------------------------------------------------------------
# ViewSpec
# ------------------------------------------------------------------------------------------------


def test_defaults_are_table_6():
  table = {
    "crop_probability": 1.0,
    "flip_probability": 0.5,
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_probability": 0.2,
    "blur_probability": 1.0,
    "solarise_probability": 0.0,
  }
  assert {name: getattr(T, name) for name in table} == table
  assert (T.crop_area, T.crop_aspect, T.blur_sigma) == ((0.08, 1.0), (3 / 4, 4 / 3), (0.1, 2.0))
  assert (T.crop_rule, T.brightness_rule) == ("one_draw", "additive")


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("flip_probability", 1.5),
    ("blur_probability", -0.1),
    ("hue", 0.6),
    ("contrast", 1.2),
    ("solarise_probability", math.nan),
    ("crop_area", (0.0, 1.0)),
    ("crop_area", (0.5, 1.1)),
    ("crop_aspect", (2.0, 1.0)),
    ("crop_aspect", (1.0, math.inf)),
    ("blur_sigma", (0.0, 2.0)),
    ("crop_rule", "twice"),
    ("brightness_rule", "subtractive"),
  ],
)
def test_spec_refuses(field, value):
  with pytest.raises(ValueError, match=field):
    ViewSpec(**{field: value})


def test_spec_names_the_choices():
  with pytest.raises(ValueError, match="'twice'; expected one of one_draw, retry"):
    ViewSpec(crop_rule="twice")


# ------------------------------------------------------------------------------------------------
# draw
# ------------------------------------------------------------------------------------------------


def test_draws_are_batchable_arrays():
  one = draw(T, np.random.default_rng(0), 8, 8)
  kinds = {name: (value.dtype.name, value.shape) for name, value in one._asdict().items()}
  assert all(type(value) is np.ndarray for value in one)
  assert kinds == {
    "crop": ("int32", (4,)),
    "flip": ("bool", ()),
    "jitter": ("bool", ()),
    "order": ("int32", (4,)),
    "brightness": ("float32", ()),
    "contrast": ("float32", ()),
    "saturation": ("float32", ()),
    "hue": ("float32", ()),
    "grayscale": ("bool", ()),
    "sigma": ("float32", ()),
    "solarise": ("bool", ()),
  }


def test_draw_is_a_function_of_the_generator():
  first, again, other = (many(T, 20, seed=seed) for seed in (5, 5, 6))
  for name in Draws._fields:
    np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
  assert not np.array_equal(first.crop, other.crop)
  assert len(np.unique(first.hue)) == 20


def test_changing_one_field_leaves_the_other_draws():
  one, other = many(T, 200), many(T_PRIME, 200)
  for name in set(Draws._fields) - {"sigma", "solarise"}:
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
  blurred = other.sigma > 0
  assert 0 < blurred.sum() < 200
  np.testing.assert_array_equal(one.sigma[blurred], other.sigma[blurred])


@pytest.mark.parametrize("spec", [T, T_PRIME], ids=["T", "T_prime"])
def test_probabilities(spec):
  draws = many(spec)
  seen = {
    "flip_probability": draws.flip,
    "jitter_probability": draws.jitter,
    "grayscale_probability": draws.grayscale,
    "blur_probability": draws.sigma > 0,
    "solarise_probability": draws.solarise,
  }
  for name, flags in seen.items():
    p = getattr(spec, name)
    low, high = stats.binom.interval(1 - 1e-6, len(flags), p)
    assert low <= flags.sum() <= high, name
    assert p not in (0, 1) or flags.sum() == p * len(flags)


def test_flags_are_independent():
  draws = many(dataclasses.replace(T_PRIME, blur_probability=0.5), 4000)
  flags = np.stack(
    [draws.flip, draws.jitter, draws.grayscale, draws.sigma > 0, draws.solarise, draws.hue > 0]
  )
  correlation = np.corrcoef(flags) - np.eye(len(flags))
  assert np.abs(correlation).max() < 5 / math.sqrt(4000)


def test_intensities_are_uniform_in_their_ranges():
  draws = many(T)
  for values, low, high in [
    (draws.brightness, -0.4, 0.4),
    (draws.contrast, 0.6, 1.4),
    (draws.saturation, 0.8, 1.2),
    (draws.hue, -0.1, 0.1),
    (draws.sigma, 0.1, 2.0),
  ]:
    assert low <= values.min() <= values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_multiplicative_brightness_is_a_factor_around_one():
  spec = dataclasses.replace(T, brightness_rule="multiplicative")
  np.testing.assert_allclose(many(spec, 50).brightness, 1 + many(T, 50).brightness, atol=1e-6)


def test_no_intensity_is_neutral():
  spec = ViewSpec(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
  one = draw(spec, np.random.default_rng(0), 8, 8)
  assert (one.brightness, one.contrast, one.saturation, one.hue) == (0, 1, 1, 0)


def test_orders_are_equally_frequent():
  orders = Counter(map(tuple, many(T, 4800).order.tolist()))
  assert set(orders) == set(itertools.permutations(range(4)))
  assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_crop_area_aspect_and_place():
  # Up to half the area, a crop of a square always fits, so that nothing is clamped.
  draws = many(ViewSpec(crop_area=(0.08, 0.5)), height=4000, width=4000)
  top, left, height, width = draws.crop.T.astype(np.float64)
  area, aspect = height * width / 4000**2, np.log(width / height)
  bound = math.log(4 / 3)
  assert stats.kstest(area, stats.uniform(0.08, 0.42).cdf).pvalue > 1e-3
  assert stats.kstest(aspect, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
  for start, length in ((top, height), (left, width)):
    assert stats.kstest(start / (4000 - length), stats.uniform().cdf).pvalue > 1e-3


def test_every_place_of_a_small_image_is_reached():
  # 5 x 5 out of 8 x 8: sixteen places.
  spec = ViewSpec(crop_area=(25 / 64, 25 / 64), crop_aspect=(1.0, 1.0))
  places = Counter(map(tuple, many(spec, 1600, 8, 8).crop.tolist()))
  assert set(places) == {(top, left, 5, 5) for top in range(4) for left in range(4)}
  assert stats.chisquare(list(places.values())).pvalue > 1e-3


def test_one_draw_clamps_a_side_that_does_not_fit():
  spec = ViewSpec(crop_area=(1.0, 1.0), crop_aspect=(4 / 3, 4 / 3))
  # sqrt(300 * 300 * 4 / 3) = 346.4 clamps to 300; 300 / sqrt(4 / 3) = 259.8 fits.
  crops = many(spec, 200, 300, 300).crop
  assert {tuple(box) for box in crops[:, 1:].tolist()} == {(0, 260, 300)}
  assert set(crops[:, 0].tolist()) <= set(range(41))
  assert len(set(crops[:, 0].tolist())) > 30


@pytest.mark.parametrize(
  ("height", "width", "aspect", "expected"),
  [
    # The crop would be wider or taller than the image ten times: the central crop with the
    # nearest allowed aspect, as torchvision's RandomResizedCrop.
    (300, 300, (4 / 3, 4 / 3), (37, 0, 225, 300)),
    (300, 300, (3 / 4, 3 / 4), (0, 37, 300, 225)),
    (100, 900, (3 / 4, 4 / 3), (0, 383, 100, 133)),
    (900, 100, (3 / 4, 4 / 3), (383, 0, 133, 100)),
    # It fits at once.
    (300, 400, (4 / 3, 4 / 3), (0, 0, 300, 400)),
  ],
)
def test_retry_falls_back_to_the_centre(height, width, aspect, expected):
  spec = ViewSpec(crop_rule="retry", crop_area=(1.0, 1.0), crop_aspect=aspect)
  assert set(map(tuple, many(spec, 20, height, width).crop.tolist())) == {expected}


def test_retry_keeps_the_drawn_shape():
  # Of a 2:1 image, half of the draws do not fit at first; those that are taken are not clamped.
  retry = many(ViewSpec(crop_rule="retry"), 2000, 400, 800).crop
  shares = retry[:, 2] * retry[:, 3] / (400 * 800)
  aspects = retry[:, 3] / retry[:, 2]
  assert 0.079 < shares.min() < shares.max() < 0.67
  assert 0.74 < aspects.min() < aspects.max() < 1.35
  clamped = many(T, 2000, 400, 800).crop
  assert (clamped[:, 2] == 400).mean() > 0.3 > (retry[:, 2] == 400).mean()


def test_whole_image_when_not_cropped():
  assert set(map(tuple, many(ViewSpec(crop_probability=0.0), 50, 30, 40).crop.tolist())) == {
    (0, 0, 30, 40)
  }
  spec = ViewSpec(crop_probability=0.5, crop_area=(0.1, 0.3))
  whole = (many(spec, 2000, 30, 40).crop[:, 2:] == (30, 40)).all(axis=1).sum()
  low, high = stats.binom.interval(1 - 1e-6, 2000, 0.5)
  assert low <= whole <= high


@settings(max_examples=150, deadline=None)
@given(
  st.integers(1, 8000),
  st.integers(1, 8000),
  st.sampled_from(augment.CROP_RULES),
  st.integers(0, 2**32),
  st.floats(0.001, 1.0),
)
def test_crop_lies_inside(height, width, rule, seed, smallest):
  spec = ViewSpec(crop_area=(smallest, 1.0), crop_rule=rule)
  top, left, h, w = draw(spec, np.random.default_rng(seed), height, width).crop.tolist()
  assert h >= 1
  assert w >= 1
  assert 0 <= top <= height - h
  assert 0 <= left <= width - w


@pytest.mark.parametrize("shape", [(1, 1), (8000, 10), (10, 8000), (1, 700)])
@pytest.mark.parametrize("rule", augment.CROP_RULES)
def test_thin_images_give_views(shape, rule):
  image = np.full((*shape, 3), 77, np.uint8)
  crops = many(ViewSpec(crop_rule=rule), 20, *shape).crop
  assert all((crop_and_resize(image, box, 16, False) == 77).all() for box in crops)


def test_draw_refuses_an_empty_image():
  with pytest.raises(ValueError, match="0x5"):
    draw(T, np.random.default_rng(0), 0, 5)


# ------------------------------------------------------------------------------------------------
# crop_and_resize
# ------------------------------------------------------------------------------------------------


def jax_resize(patch, size):
  x = jax.image.resize(patch.astype(np.float32), (size, size, 3), "cubic", antialias=False)
  return np.clip(np.rint(np.asarray(x)), 0, 255).astype(np.int32)


def pillow_resize(patch, shape):
  """Horizontal, then vertical: in one call, which pass is first depends on Pillow's version."""
  image = Image.fromarray(patch)
  for size in ((shape[1], patch.shape[0]), shape[::-1]):
    image = image.resize(size, Image.Resampling.BICUBIC)
  return np.asarray(image).astype(np.int32)


def pillow_one_call(patch, shape):
  image = Image.fromarray(patch).resize(shape[::-1], Image.Resampling.BICUBIC)
  return np.asarray(image).astype(np.int32)


CROPS = [
  ((0, 0, 375, 500), 224),  # reducing
  ((20, 31, 100, 81), 224),  # enlarging
  ((3, 200, 300, 90), 128),  # one axis each
  ((5, 7, 1, 60), 32),  # one pixel high
]


@pytest.mark.parametrize(("box", "size"), CROPS)
def test_resize_equals_jax_without_antialias(photo, box, size):
  top, left, h, w = box
  ours = crop_and_resize(photo, crop(*box), size, antialias=False)
  theirs = jax_resize(photo[top : top + h, left : left + w], size)
  assert ours.dtype == np.uint8
  assert np.abs(ours - theirs).max() <= 1
  assert (ours == theirs).mean() > 0.99


@pytest.mark.parametrize(("box", "size"), [((0, 0, 97, 131), 28), ((10, 20, 15, 9), 28)])
def test_resize_equals_jax_where_bicubic_overshoots(noise, box, size):
  top, left, h, w = box
  ours = crop_and_resize(noise, crop(*box), size, antialias=False)
  assert {0, 255} <= set(ours.ravel().tolist())
  assert np.abs(ours - jax_resize(noise[top : top + h, left : left + w], size)).max() <= 1


def test_small_digit_equals_jax(digit):
  ours = crop_and_resize(digit, crop(0, 0, 8, 8), 16, antialias=False)
  assert np.abs(ours - jax_resize(digit, 16)).max() <= 1
  assert ours.max() > 200


@pytest.mark.parametrize(("box", "size"), CROPS)
def test_antialias_equals_pillow(photo, box, size):
  top, left, h, w = box
  ours = crop_and_resize(photo, crop(*box), size, antialias=True)
  patch = photo[top : top + h, left : left + w]
  assert np.abs(ours - pillow_resize(patch, (size, size))).max() <= 1
  # On a photograph the order of the passes is seen in few pixels.
  assert (np.abs(ours - pillow_one_call(patch, (size, size))) <= 1).mean() > 0.999


def test_antialias_equals_pillow_where_bicubic_overshoots(noise):
  for box, size in [((0, 0, 97, 131), 28), ((10, 20, 15, 9), 28)]:
    top, left, h, w = box
    ours = crop_and_resize(noise, crop(*box), size, antialias=True)
    theirs = pillow_resize(noise[top : top + h, left : left + w], (size, size))
    assert np.abs(ours - theirs).max() <= 1


def test_antialias_matters_only_when_reducing(noise, photo):
  reduced = [crop_and_resize(noise, crop(0, 0, 97, 131), 28, antialias=a) for a in (False, True)]
  assert reduced[0].std() > 1.5 * reduced[1].std()
  enlarged = [crop_and_resize(photo, crop(9, 9, 50, 60), 96, antialias=a) for a in (False, True)]
  assert np.abs(enlarged[0].astype(int) - enlarged[1]).max() <= 1


def test_same_size_is_the_patch_itself(noise):
  result = crop_and_resize(noise, crop(5, 9, 32, 32), 32, antialias=False)
  np.testing.assert_array_equal(result, noise[5:37, 9:41])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_mirrored_image_gives_mirrored_view(noise, data):
  h, w = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
  top, left = data.draw(st.integers(0, 97 - h)), data.draw(st.integers(0, 131 - w))
  size, antialias = data.draw(st.sampled_from([8, 16, 28])), data.draw(st.booleans())
  one = crop_and_resize(noise, crop(top, left, h, w), size, antialias)
  mirrored = np.ascontiguousarray(noise[:, ::-1])
  other = crop_and_resize(mirrored, crop(top, 131 - left - w, h, w), size, antialias)
  assert np.abs(one.astype(int) - other[:, ::-1]).max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 0, 5, 5), (90, 0, 8, 5), (0, 130, 5, 2)])
def test_crop_outside_is_refused(noise, box):
  with pytest.raises(ValueError, match="expected a part of the 97x131 image"):
    crop_and_resize(noise, crop(*box), 16, False)


def test_size_is_refused(noise):
  with pytest.raises(ValueError, match="positive size"):
    crop_and_resize(noise, crop(0, 0, 5, 5), 0, False)


# ------------------------------------------------------------------------------------------------
# evaluation_view
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("height", "width", "size", "resize"),
  [
    (427, 640, 224, 256),  # landscape
    (427, 301, 224, 256),  # portrait
    (256, 256, 224, 256),
    (100, 83, 112, 128),  # smaller than resize
    (11, 600, 16, 18),  # thin
    (40, 40, 28, 28),
  ],
)
def test_paper_rule_equals_pillow(photo, height, width, size, resize):
  image = np.ascontiguousarray(photo[:height, :width])
  short = min(height, width)
  full = tuple(int(resize * side / short) for side in (height, width))
  top, left = (round((side - size) / 2) for side in full)
  theirs = pillow_resize(image, full)[top : top + size, left : left + size]
  ours = evaluation_view(image, size, resize, "paper")
  assert ours.shape == (size, size, 3)
  assert np.abs(ours - theirs).max() <= 1


def test_paper_rule_on_digits_equals_pillow():
  greys = np.round(load_digits().images[:100] * 255 / 16).astype(np.uint8)
  for image in np.repeat(greys[..., None], 3, axis=-1):
    ours = evaluation_view(image, 16, 16, "paper")
    assert np.abs(ours - pillow_one_call(image, (16, 16))).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 233)])
def test_reference_rule_crops_then_resizes(photo, height, width):
  image = np.ascontiguousarray(photo[:height, :width])
  side = int(224 / 256 * min(height, width))
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  theirs = jax_resize(image[top : top + side, left : left + side], 224)
  assert np.abs(evaluation_view(image, 224, 256, "reference") - theirs).max() <= 1


def test_a_long_strip_is_not_resized_whole():
  # Whole, it would have 256 x 1,280,000 pixels.
  strip = np.zeros((1, 5000, 3), np.uint8)
  strip[:, 2490:2510] = 200
  view = evaluation_view(strip, 224, 256, "paper")
  assert (view == 200).all()


def test_evaluation_view_refuses(noise):
  with pytest.raises(ValueError, match="size is 224, resize is 200"):
    evaluation_view(noise, 224, 200, "paper")
  with pytest.raises(ValueError, match="'papers'; expected one of paper, reference"):
    evaluation_view(noise, 16, 16, "papers")


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (28, 3), (20, 3), (19, 1), (16, 1)])
def test_blur_taps(size, taps):
  assert 2 * augment.blur_radius(size) + 1 == taps
