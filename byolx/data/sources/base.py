"""Interface of data sources (`Source`), and source classes for several kinds of data sets.

A source gives access to the examples of a data set by index. Its labels and classes are available
without decoding an image. A source can be pickled, so that worker processes can use it. All images are
uint8 RGB pixels. The data sets are opened by functions in these modules of the package:

  small      scikit-learn's digits, and Fashion-MNIST from Debian's package
  cifar      CIFAR-10 and CIFAR-100
  folders    image trees: a folder of class folders, ImageNet, Places365
  prepared   sets written by `byolx prepare`
  tfds       sets written by TensorFlow Datasets
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from byolx.data.decode import decode, read_file
from byolx.data.sources.names import Names, Numbered, Picked
from byolx.data.sources.retry import with_retries

SPLITS = ("train", "test")
SPLIT_SEED = 0
"""Seed of test splits held out from the training images; fixed, so that the split is always the same."""


class Example(NamedTuple):
  """One example of a data set: an image and its label.

  Attributes:
    image: RGB pixels 0..255.
    label: class of the image, -1 if it is unlabelled.
    key: name of the example for messages.
  """

  image: UInt8[np.ndarray, "h w 3"]
  label: int
  key: str


@runtime_checkable
class Source(Protocol):
  """Interface of data sources: access to the examples of a data set by index.

  Attributes:
    name: name of the data set.
    labels: class of each example, -1 if it is unlabelled; available without decoding.
    classes: names of the classes, empty for an unlabelled set.
    names: name of each example, such as its file. Held-out splits are chosen by these names.
  """

  name: str
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]
  names: Sequence[str]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      DecodeError: the image cannot be read; the message starts with the example's name.
    """


@runtime_checkable
class EncodedSource(Source, Protocol):
  """Interface of data sources that can also return the undecoded bytes of an image file."""

  def encoded(self, index: int) -> tuple[bytes, str]:
    """Returns the bytes of an image file, and the name of the example for messages.

    Raises:
      DecodeError: the file cannot be read.
    """


@dataclass(frozen=True, eq=False)
class ArraySource:
  """Data source of images of one size that are held in memory.

  Attributes:
    name: name of the data set.
    images: grey or RGB pixels 0..255.
    labels: class of each image, -1 if it is unlabelled.
    classes: names of the classes.
  """

  name: str
  images: UInt8[np.ndarray, "n h w"] | UInt8[np.ndarray, "n h w 3"]
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]

  @property
  def names(self) -> Numbered:
    return Numbered(self.name, len(self))

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    image = self.images[index]
    image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()
    return Example(image, int(self.labels[index]), f"{self.name}/{index}")


@dataclass(frozen=True, eq=False)
class FileSource:
  """Data source of image files in a folder; a file is opened only when its example is read.

  Attributes:
    name: name of the data set.
    folder: path of the folder.
    files: paths of the image files, relative to `folder`.
    labels: class of each file, -1 if it is unlabelled.
    classes: names of the classes, empty for an unlabelled set.
  """

  name: str
  folder: str
  files: Names
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]

  @property
  def names(self) -> Names:
    return self.files

  def __len__(self) -> int:
    return len(self.files)

  def encoded(self, index: int) -> tuple[bytes, str]:
    path = os.path.join(self.folder, self.files[index])
    return with_retries(lambda: read_file(path), self.folder), path

  def __getitem__(self, index: int) -> Example:
    data, path = self.encoded(index)
    return Example(decode(data, path), int(self.labels[index]), path)


@dataclass(frozen=True, eq=False)
class Subset:
  """Data source with some examples of another one: those at `indices`, in the order of `indices`."""

  source: Source
  indices: Int64[np.ndarray, "k"]

  @property
  def name(self) -> str:
    return self.source.name

  @property
  def labels(self) -> Int32[np.ndarray, "k"]:
    return self.source.labels[self.indices]

  @property
  def classes(self) -> tuple[str, ...]:
    return self.source.classes

  @property
  def names(self) -> Picked:
    return Picked(self.source.names, self.indices)

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.indices[index])]


@dataclass(frozen=True, eq=False)
class EncodedSubset(Subset):
  """A `Subset` of an `EncodedSource`: it can also return the undecoded bytes of an image file."""

  source: EncodedSource

  def encoded(self, index: int) -> tuple[bytes, str]:
    return self.source.encoded(int(self.indices[index]))


def subset(source: Source, indices: Int64[np.ndarray, "k"]) -> Subset:
  """Returns a data source with the examples of `source` at `indices`, in the order of `indices`.

  If `source` can return undecoded image files (`EncodedSource`), the result can do the same.
  """
  if isinstance(source, EncodedSource):
    return EncodedSubset(source, indices)
  return Subset(source, indices)


def check_split(split: str) -> None:
  """Checks that `split` is 'train' or 'test'.

  Raises:
    ValueError: `split` is neither.
  """
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
