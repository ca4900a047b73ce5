"""What an evaluation may be told: the config group `eval`."""

import dataclasses

from byolx.core.fields import at_least, between, each, field, one_of


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """How a trained encoder or classifier is measured; nothing that is trained depends on it."""

  test: bool = field(
    True, "classification: measure the test images, by what validation chose", free=True
  )
  predictions: bool = field(
    False, "classification: write predictions.npz, what was said of every test image", free=True
  )
  bootstrap: int = field(
    0,
    "classification: resamples of the test images for a 95 % interval; 0: none",
    at_least(0),
    free=True,
  )
  resize: int = field(
    256, "shorter side, pixels, before the centre crop of views.size", at_least(4), free=True
  )
  crop_rule: str = field(
    "paper", "resize then crop, or crop then resize", one_of("paper", "reference"), free=True
  )
  antialias: bool = field(
    False,
    "antialias when an image is made smaller, as Pillow does and the authors do not; see views.antialias",
    free=True,
  )
  fractions: tuple[float, ...] = field(
    (0.01, 0.1, 1.0), "shares of the training labels", each(between(1e-6, 1)), free=True
  )
  draws: int = field(3, "seeded draws of each share below 1", at_least(1), free=True)
  batch_size: int = field(256, "images per forward pass", at_least(1), free=True)
  max_train: int = field(
    0, "at most so many training images, for large sets; 0: all", at_least(0), free=True
  )
