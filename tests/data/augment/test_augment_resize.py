"""Crops and the evaluation view, against jax.image.resize and Pillow."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from byolx.data.augment.resizing import crop_and_resize, evaluation_view


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
# crop_and_resize
# ------------------------------------------------------------------------------------------------


def jax_resize(patch, size):
  return jax_resize_to(patch, (size, size))


def jax_resize_to(patch, shape):
  x = jax.image.resize(patch.astype(np.float32), (*shape, 3), "cubic", antialias=False)
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
@pytest.mark.parametrize("antialias", [False, True])
def test_paper_rule_equals_pillow_antialiased_and_jax_else(
  photo, height, width, size, resize, antialias
):
  image = np.ascontiguousarray(photo[:height, :width])
  short = min(height, width)
  full = tuple(int(resize * side / short) for side in (height, width))
  top, left = (round((side - size) / 2) for side in full)
  resized = pillow_resize(image, full) if antialias else jax_resize_to(image, full)
  theirs = resized[top : top + size, left : left + size]
  ours = evaluation_view(image, size, resize, "paper", antialias)
  assert ours.shape == (size, size, 3)
  assert np.abs(ours - theirs).max() <= 1


def test_paper_rule_on_digits_equals_pillow():
  greys = np.round(load_digits().images[:100] * 255 / 16).astype(np.uint8)
  for image in np.repeat(greys[..., None], 3, axis=-1):
    ours = evaluation_view(image, 16, 16, "paper", antialias=True)
    assert np.abs(ours - pillow_one_call(image, (16, 16))).max() <= 1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 233)])
def test_reference_rule_crops_then_resizes(photo, height, width, antialias):
  image = np.ascontiguousarray(photo[:height, :width])
  side = int(224 / 256 * min(height, width))
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  patch = image[top : top + side, left : left + side]
  theirs = pillow_resize(patch, (224, 224)) if antialias else jax_resize(patch, 224)
  assert np.abs(evaluation_view(image, 224, 256, "reference", antialias) - theirs).max() <= 1


@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_evaluation_without_antialias_is_the_default_and_differs_where_images_shrink(photo, rule):
  plain, smooth = (evaluation_view(photo, 56, 64, rule, antialias) for antialias in (False, True))
  np.testing.assert_array_equal(plain, evaluation_view(photo, 56, 64, rule))
  assert np.abs(plain.astype(int) - smooth).max() > 20


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_an_image_that_is_not_scaled_stays_as_it_is_to_the_bit(rule, antialias):
  for grey in np.round(load_digits().images[:100] * 255 / 16).astype(np.uint8):
    image = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(evaluation_view(image, 8, 8, rule, antialias), image)


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
