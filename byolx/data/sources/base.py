"""What is on disk (or inside scikit-learn), as random-access examples.

A source knows its labels and classes without decoding an image, gives any example by its number,
and can be pickled, so that worker processes can have it. Every source yields uint8 RGB pixels.

Here are the kinds of source and the two sets that come with a system:

  digits          scikit-learn's 1797 images of 8 x 8 pixels: nothing to download
  fashion_mnist   70,000 images of 28 x 28, from Debian's package dataset-fashion-mnist

The others are made in `folders` (image trees: a folder of one's own, ImageNet, Places365), `cifar`,
`records` (sets that `byolx prepare` wrote) and `tfds`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from byolx.data.decode import decode, read_file
from byolx.data.sources.names import Names, Numbered, Picked
from byolx.data.sources.retry import patiently

SPLITS = ("train", "test")
SPLIT_SEED = 0
"""The seed of every held-out share here: fixed, so that a data set has one test split."""


class Example(NamedTuple):
  """One example: RGB pixels 0..255, its class (-1 if unlabelled), and a name for messages."""

  image: UInt8[np.ndarray, "h w 3"]
  label: int
  key: str


@runtime_checkable
class Source(Protocol):
  """Random access to examples.

  Attributes:
    name: of the data set.
    labels: class of every example, -1 if it has none; known without decoding.
    classes: names of the classes, empty if there are none.
    names: of every example: its file, or its key in the set. Splits are chosen by them.
  """

  name: str
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]
  names: Sequence[str]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Raises DecodeError if the example cannot be read; the message starts with its name."""


@runtime_checkable
class EncodedSource(Source, Protocol):
  """A source of encoded images, whose `source[i].image` is `decode(*source.encoded(i))`."""

  def encoded(self, index: int) -> tuple[bytes, str]:
    """The bytes of an image file and the name for messages; raises DecodeError."""


@dataclass(frozen=True, eq=False)
class ArraySource:
  """Images of one size, grey or RGB, held in memory."""

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
  """Image files; `files` are relative to `folder`."""

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
    return patiently(lambda: read_file(path), self.folder), path

  def __getitem__(self, index: int) -> Example:
    data, path = self.encoded(index)
    return Example(decode(data, path), int(self.labels[index]), path)


@dataclass(frozen=True, eq=False)
class Subset:
  """Some examples of another source, in the order of their indices."""

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
  """Some examples of a source of encoded images."""

  source: EncodedSource

  def encoded(self, index: int) -> tuple[bytes, str]:
    return self.source.encoded(int(self.indices[index]))


def subset(source: Source, indices: Int64[np.ndarray, "k"]) -> Subset:
  """Some examples of a source, encoded ones if the source's are."""
  if isinstance(source, EncodedSource):
    return EncodedSubset(source, indices)
  return Subset(source, indices)


def check_split(split: str) -> None:
  """Refuses what is not the name of a split.

  Raises:
    ValueError: unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
