"""The images of a run: to train on, to choose by, to test on."""

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
"""The function that opens a split, by data.source."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The config group `data`: which images, and which of them for what."""

  source: str = field("digits", "where images come from", one_of(*SOURCES))
  folder: str = field(
    "", "folder of the source, as it was unpacked or prepared; digits needs none", free=True
  )
  validation: str = field(
    "none",
    "training images kept apart, to choose by: ImageNet's of appendix D.1, or of the code; or a share",
    one_of("none", "last_10009", "first_10000", "share"),
  )
  validation_share: float = field(
    0.1, "of data.validation=share, the same of every class", between(0.001, 0.9)
  )
  labels: float = field(
    1.0,
    "share of the training images that is used, as many of every class; a smaller share lies inside a "
    "larger one (Figure 4)",
    between(1e-6, 1),
  )
  labels_seed: int = field(0, "chooses them", between(0, 2**32 - 1))
  label_list: str = field(
    "", "a file with the names of the training images to use instead, such as SimCLR's 1percent.txt"
  )
  test_share: float = field(
    0.2, "share held out for testing, where the source has no test set", between(0.01, 0.9)
  )
  max_failed_share: float = field(
    0.01, "share of files that may fail to decode before the run stops", between(0, 1)
  )
  workers: int = field(
    0, "processes that make views; 0: this process; -1: one per core", at_least(-1), free=True
  )
  threads: int = field(1, "threads that make views, in each of them", at_least(1), free=True)
  prefetch: int = field(2, "batches made ahead", at_least(1), free=True)


class Sources(NamedTuple):
  """Images to train on, to choose by (data.validation), and to test on (None: not to be looked at)."""

  train: base.Source
  validation: base.Source | None
  test: base.Source | None
  labels: float = 1.0
  """Share of the training images' labels that is used."""

  @property
  def held_out(self) -> tuple[str, base.Source]:
    """What a run that chooses nothing is measured on, and the name of that split."""
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test


def build_sources(config: ConfigDict) -> Sources:
  """The images of a run.

  With data.validation, a task that chooses nothing, such as pretraining, is measured on the validation
  images, and the test images need not be there. data.labels and data.label_list choose among the
  images that are not held out.

  Raises:
    ConfigError: they are not there, or not enough of them.
  """
  make, kind = SOURCES[config.data.source](DataSpec(**config.data)), TASKS[config.task]
  try:
    train = make(split="train")
    whole = config.data.validation == "none"
    tested = whole or (kind.selects and config.eval.test)
    test = make(split="test") if tested else None
  except ValueError as error:
    raise ConfigError(str(error)) from None
  rest, held = np.arange(len(train)), np.empty(0, np.int64)
  if not whole:
    rest, held = _validation(config, train)
  used, held = _used(config, train, rest, held)
  validation = None if whole else base.subset(train, held)
  if kind.needs_labels:
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
  """Indices of the rest, and of what data.validation keeps apart."""
  data = config.data
  if data.validation == "share":
    return splits.stratified_holdout(
      train.labels, data.validation_share, base.SPLIT_SEED, train.names
    )
  try:
    return splits.imagenet_validation(train.names, data.validation)
  except ValueError as error:
    raise ConfigError(
      f"data.validation={data.validation}: {error}; it is meant for ImageNet (data.source=imagenet,"
      " or ImageNet as array_record, tfds or image_folder) and works for any source that large"
    ) from None


def _used(
  config: ConfigDict, train: base.Source, rest: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of what is trained on, and of what is held out then.

  A list is trained on whole, as all who use it do: its images are not validation images.
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
