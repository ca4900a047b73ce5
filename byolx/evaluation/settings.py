"""Evaluation settings: the config group `eval`."""

import dataclasses

from byolx.core.fields import at_least, between, each, field, one_of


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """The config group `eval`: settings of the evaluation of encoders and classifiers.

  Training does not depend on these fields.
  """

  test: bool = field(
    True, "classification: measurement of the selected classifier on the test images", free=True
  )
  predictions: bool = field(
    False,
    "classification: file predictions.npz with the predictions for the test images",
    free=True,
  )
  bootstrap: int = field(
    0,
    "classification: number of bootstrap resamples for 95 % intervals of test accuracy; 0: no interval",
    at_least(0),
    free=True,
  )
  resize: int = field(
    256,
    "shorter side of an image before the centre crop of side views.size, in pixels",
    at_least(4),
    free=True,
  )
  crop_rule: str = field(
    "paper",
    "order of the centre crop: paper, resize and crop; reference, crop and resize, as the authors' code",
    one_of("paper", "reference"),
    free=True,
  )
  antialias: bool = field(
    False,
    "antialiasing when an image shrinks, as in Pillow but not in the authors' code",
    free=True,
  )
  fractions: tuple[float, ...] = field(
    (0.01, 0.1, 1.0),
    "pretraining: shares of the training labels used by linear probes",
    each(between(1e-6, 1)),
    free=True,
  )
  draws: int = field(
    3,
    "pretraining: random subsets of labels per share of eval.fractions below 1",
    at_least(1),
    free=True,
  )
  batch_size: int = field(
    256, "images per evaluation batch, over all devices", at_least(1), free=True
  )
  max_train: int = field(
    0,
    "pretraining: largest number of training images used by probes; 0: all",
    at_least(0),
    free=True,
  )
