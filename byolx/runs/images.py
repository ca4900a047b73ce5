"""Opens the images of a run, and divides them into the training, validation and test splits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from byolx.core.config import ConfigError
from byolx.core.fields import at_least, between, field, one_of
from byolx.data import splits
from byolx.data.sources import base, cifar, folders, prepared, small, tfds
from byolx.tasks import TASKS

SOURCES: dict[str, Callable[["DataSpec"], Callable[..., base.Source]]] = {
  "digits": lambda data: functools.partial(small.digits, test_share=data.test_share),
  "fashion_mnist": lambda data: functools.partial(small.fashion_mnist, data.folder),
  "image_folder": lambda data: functools.partial(
    folders.image_folder, data.folder, test_share=data.test_share
  ),
  "imagenet": lambda data: functools.partial(folders.imagenet, data.folder),
  "places365": lambda data: functools.partial(folders.places365, data.folder),
  "cifar10": lambda data: functools.partial(cifar.cifar10, data.folder),
  "cifar100": lambda data: functools.partial(cifar.cifar100, data.folder),
  "array_record": lambda data: functools.partial(
    prepared.prepared, data.folder, test_share=data.test_share
  ),
  "tfds": lambda data: functools.partial(tfds.tfds, data.folder),
}
"""Functions by the value of data.source.

Each takes the config group `data` and returns a function that opens one split, "train" or "test".
"""


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The config group `data`: the images, their division into splits, and how they are loaded."""

  source: str = field("digits", "data set, or format of the user's own images", one_of(*SOURCES))
  folder: str = field(
    "", "folder of the images, unpacked or prepared; not needed for digits", free=True
  )
  validation: str = field(
    "none",
    "validation images, taken out of the training images: last_10009, ImageNet's in appendix D.1; "
    "first_10000, ImageNet's in the authors' code; share, data.validation_share of each class; or none",
    one_of("none", "last_10009", "first_10000", "share"),
  )
  validation_share: float = field(
    0.1,
    "with data.validation=share: share of the training images that is used for validation",
    between(0.001, 0.9),
  )
  labels: float = field(
    1.0,
    "share of the labelled training images that is used, balanced over the classes; a smaller share is "
    "part of a larger one (Figure 4)",
    between(1e-6, 1),
  )
  labels_seed: int = field(
    0, "seed of the random choice of the share data.labels", between(0, 2**32 - 1)
  )
  label_list: str = field(
    "",
    "file with the names of the training images to use, such as SimCLR's 1percent.txt; empty: no list",
  )
  test_share: float = field(
    0.2,
    "share of the images held out for the test if the source has no test set",
    between(0.01, 0.9),
  )
  max_failed_share: float = field(
    0.01, "largest share of unreadable images; above it, the run stops", between(0, 1)
  )
  workers: int = field(
    0,
    "worker processes that load batches; 0: none, the main process loads them; -1: one per core",
    at_least(-1),
    free=True,
  )
  threads: int = field(1, "threads that load images, per process", at_least(1), free=True)
  prefetch: int = field(2, "batches loaded in advance", at_least(1), free=True)


class Sources(NamedTuple):
  """Images of a run, by split.

  Attributes:
    train: training images.
    validation: validation images; None if data.validation is "none".
    test: test images; None if the run does not measure them.
    labels: share of the training labels that is used, in (0, 1].
  """

  train: base.Source
  validation: base.Source | None
  test: base.Source | None
  labels: float = 1.0

  @property
  def held_out(self) -> tuple[str, base.Source]:
    """Name and images of the split on which pretrained encoders are evaluated.

    This is the validation split. If the run has no validation images, it is the test split.
    """
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test


def build_sources(config: ConfigDict) -> Sources:
  """Opens the images of a run and divides them into splits.

  If the run has validation images and its task selects no model, the test images need not exist.
  Pretraining is such a task: it is measured on the validation images. data.labels selects a share of the
  training images that are not held out for validation. All images of data.label_list are used for
  training, and none of them for validation.

  Args:
    config: config of the run, with all fields.

  Raises:
    ConfigError: images are missing, too few or not labelled.
  """
  open_split, task = SOURCES[config.data.source](DataSpec(**config.data)), TASKS[config.task]
  try:
    train = open_split(split="train")
    whole = config.data.validation == "none"
    tested = whole or (task.selects and config.eval.test)
    test = open_split(split="test") if tested else None
  except ValueError as error:
    raise ConfigError(str(error)) from None
  rest, held = np.arange(len(train)), np.empty(0, np.int64)
  if not whole:
    rest, held = _validation(config, train)
  used, held = _used(config, train, rest, held)
  validation = None if whole else base.subset(train, held)
  if task.needs_labels:
    for name, images in (("validation", validation), ("test", test)):
      if images is not None and not (images.labels >= 0).any():
        raise ConfigError(
          f"task={config.task}: none of the {len(images)} {name} images is labelled"
        )
  return Sources(
    train if len(used) == len(train) else base.subset(train, used),
    validation,
    test,
    round(len(used) / len(train), 4) if config.data.label_list else config.data.labels,
  )


def _validation(config: ConfigDict, train: base.Source) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of the images left for training, and of the validation images.

  Args:
    config: config of the run; data.validation is not "none".
    train: all training images of the source.

  Raises:
    ConfigError: the rule of data.validation does not fit the images.
  """
  data = config.data
  if data.validation == "share":
    return splits.stratified_holdout(
      train.labels, data.validation_share, base.SPLIT_SEED, train.names
    )
  try:
    return splits.imagenet_validation(train.names, data.validation)
  except ValueError as error:
    raise ConfigError(
      f"data.validation={data.validation}: {error}; the rule is ImageNet's (data.source=imagenet, or"
      " ImageNet as array_record, tfds or image_folder), and other sources must be as large"
    ) from None


def _used(
  config: ConfigDict, train: base.Source, rest: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of the images used for training, and of the validation images.

  With data.label_list, all images of the list are used for training, as in other work with such lists,
  and they are removed from the validation images.

  Args:
    config: config of the run, with all fields.
    train: all training images of the source.
    rest: indices of the images that are not held out for validation.
    held: indices of the validation images.

  Raises:
    ConfigError: data.labels or data.label_list does not fit the images.
  """
  data = config.data
  if data.label_list:
    if data.labels < 1:
      raise ConfigError(
        f"data.labels={data.labels} with data.label_list={data.label_list}: expected one of them"
      )
    try:
      used = splits.listed(train.names, splits.read_list(data.label_list))
    except (OSError, ValueError) as error:
      raise ConfigError(f"data.label_list={data.label_list}: {error}") from None
    return used, np.setdiff1d(held, used)
  if data.labels == 1:
    return rest, held
  try:
    return splits.labelled_share(train.labels, rest, data.labels, data.labels_seed), held
  except ValueError as error:
    raise ConfigError(f"data.labels={data.labels}: {error}") from None
