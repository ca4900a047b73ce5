"""Views: specs and draws, against Table 6 and the rules of the crop."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from byolx.data.augment import distribution
from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.resizing import crop_and_resize

T = ViewSpec()
T_PRIME = ViewSpec(blur_probability=0.1, solarise_probability=0.2)


def many(spec, n=3000, height=375, width=500, seed=0):
  """n draws of one generator, each field stacked."""
  rng = np.random.default_rng(seed)
  return Draws(*map(np.stack, zip(*(draw(spec, rng, height, width) for _ in range(n)))))


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
  st.sampled_from(distribution.CROP_RULES),
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
@pytest.mark.parametrize("rule", distribution.CROP_RULES)
def test_thin_images_give_views(shape, rule):
  image = np.full((*shape, 3), 77, np.uint8)
  crops = many(ViewSpec(crop_rule=rule), 20, *shape).crop
  assert all((crop_and_resize(image, box, 16, False) == 77).all() for box in crops)


def test_draw_refuses_an_empty_image():
  with pytest.raises(ValueError, match="0x5"):
    draw(T, np.random.default_rng(0), 0, 5)


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (28, 3), (20, 3), (19, 1), (16, 1)])
def test_blur_taps(size, taps):
  assert 2 * distribution.blur_radius(size) + 1 == taps
