"""What RandAugment's tests share: images, and every operation's strengths at all magnitudes."""

import functools

import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from byolx.data.augment.randaugment import OPERATIONS, Operations, apply

BINS = 31
GEOMETRIC = ("shear_x", "shear_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
WITHOUT_STRENGTH = ("identity", "autocontrast", "equalize")


@functools.cache
def images():
  """Photographs and what is at the edges of the formulas: small, grey, and flat images."""
  flower, china = load_sample_image("flower.jpg"), load_sample_image("china.jpg")
  digits = (load_digits().images[:3] * 15).astype(np.uint8)
  halves = np.full((24, 24, 3), 200, np.uint8)
  halves[:, :12] = 7
  found = {
    "flower": flower[100:324, 200:424],
    "china": china[50:274, 200:424],
    "flower 24": flower[200:224, 300:324],
    "china 24": china[100:124, 100:124],
    "grey": np.repeat(flower[:96, :96, 1:2], 3, axis=-1),
    "digit 0": np.repeat(digits[0, ..., None], 3, axis=-1),
    "digit 1": np.repeat(digits[1, ..., None], 3, axis=-1),
    "constant": np.full((24, 24, 3), (77, 0, 255), np.uint8),
    "white": np.full((24, 24, 3), 255, np.uint8),
    "halves": halves,
    "3 x 3": china[100:103, 100:103],
    "2 x 2": china[100:102, 100:102],
    "1 x 1": china[100:101, 100:101],
  }
  for image in found.values():
    image.flags.writeable = False
  return found


IMAGES = list(images())


def magnitudes(name):
  """All 31 arguments of an operation with both signs, as torchvision's _augmentation_space."""
  if name in WITHOUT_STRENGTH:
    return [0.0]
  if name == "posterize":
    return (8 - (np.arange(BINS) / ((BINS - 1) / 4)).round()).tolist()
  if name == "solarize":
    return np.linspace(255.0, 0.0, BINS).tolist()
  if name in BLENDS:
    middle, largest = 1.0, 0.9
  else:
    middle, largest = 0.0, {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3}.get(name, 150.0 / 331.0)
  span = np.linspace(0.0, largest, BINS)
  return np.concatenate([middle + span, middle - span]).tolist()


def single(name, strength):
  """The operations of a view with one of them."""
  index = np.array([OPERATIONS.index(name)], np.int32)
  return Operations(index, np.array([strength], np.float32))


def run(name, view, strength, interpolation="nearest"):
  """One operation, its strength in float32 as it is drawn."""
  return apply(view, single(name, strength), interpolation)
