"""The images of a run: to train on, to choose by, to test on."""

import functools
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from byolx.core.config import ConfigError
from byolx.data import splits
from byolx.data.sources import base, cifar, folders, prepared, small, tfds

from byolx.tasks import TASKS


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
  images, and the test images need not be there; data.labels and data.label_list choose among what is not held out.

  Raises:
    ConfigError: they are not there, or not enough of them.
  """
  make, kind = _opener(config), TASKS[config.task]
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


def _opener(config: ConfigDict):
  """The function that opens a split of a config's source."""
  data = config.data
  makers = {
    "digits": functools.partial(small.digits, test_share=data.test_share),
    "fashion_mnist": functools.partial(small.fashion_mnist, data.folder),
    "image_folder": functools.partial(
      folders.image_folder, data.folder, test_share=data.test_share
    ),
    "imagenet": functools.partial(folders.imagenet, data.folder),
    "places365": functools.partial(folders.places365, data.folder),
    "cifar10": functools.partial(cifar.cifar10, data.folder),
    "cifar100": functools.partial(cifar.cifar100, data.folder),
    "array_record": functools.partial(prepared.prepared, data.folder, test_share=data.test_share),
    "tfds": functools.partial(tfds.tfds, data.folder),
  }
  return makers[data.source]


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
