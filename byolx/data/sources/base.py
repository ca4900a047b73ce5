"""Source protocol, and the source classes that the layouts share.

A source gives random access to examples by index. Its labels and classes are available without
decoding an image, and it can be pickled, so that worker processes can use it. Every source yields
uint8 RGB pixels. The data sets are opened by functions of the other modules:

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
"""Seed of the held-out test splits: fixed, so that a data set always has the same test split."""


class Example(NamedTuple):
  """One example.

  Attributes:
    image: RGB pixels 0..255.
    label: class of the image, -1 if it is unlabelled.
    key: name of the example in messages.
  """

  image: UInt8[np.ndarray, "h w 3"]
  label: int
  key: str


@runtime_checkable
class Source(Protocol):
  """Random access to examples.

  Attributes:
    name: name of the data set.
    labels: class of each example, -1 if it is unlabelled; available without decoding.
    classes: names of the classes, empty for an unlabelled set.
    names: name of each example: its file, or its key in the set. Splits are chosen by these names.
  """

  name: str
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]
  names: Sequence[str]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example; raises DecodeError, whose message starts with the example's name."""


@runtime_checkable
class EncodedSource(Source, Protocol):
  """A source of encoded images, whose `source[i].image` is `decode(*source.encoded(i))`."""

  def encoded(self, index: int) -> tuple[bytes, str]:
    """Returns the bytes of an image file and its name in messages; raises DecodeError."""


@dataclass(frozen=True, eq=False)
class ArraySource:
  """Images of one size, grey or RGB, in memory; attributes as in `Source`."""

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
  """Image files in a folder.

  Attributes:
    name, labels, classes: the attributes of `Source`.
    folder: path of the folder.
    files: paths of the image files, relative to `folder`.
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
  """The examples of another source at `indices`, in this order."""

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
  """A subset of a source of encoded images."""

  source: EncodedSource

  def encoded(self, index: int) -> tuple[bytes, str]:
    return self.source.encoded(int(self.indices[index]))


def subset(source: Source, indices: Int64[np.ndarray, "k"]) -> Subset:
  """Selects the examples at `indices`; the subset of an EncodedSource is an EncodedSource."""
  if isinstance(source, EncodedSource):
    return EncodedSubset(source, indices)
  return Subset(source, indices)


def check_split(split: str) -> None:
  """Checks that `split` is 'train' or 'test'.

  Raises:
    ValueError: unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
