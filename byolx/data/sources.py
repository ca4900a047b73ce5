"""What is on disk (or inside scikit-learn), as random-access examples.

A source knows its labels and classes without decoding an image, gives any example by its number,
and can be pickled, so that worker processes can have it. Every source yields uint8 RGB pixels.

Here are the kinds of source and the two sets that come with a system:

  digits          scikit-learn's 1797 images of 8 x 8 pixels: nothing to download
  fashion_mnist   70,000 images of 28 x 28, from Debian's package dataset-fashion-mnist

The others are made in `folders` (image trees: a folder of one's own, ImageNet, Places365), `cifar`,
`records` (sets that `byolx prepare` wrote) and `tfds`.
"""

import gzip
import importlib.util
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from byolx.data.decode import decode, read_file
from byolx.data.names import Names, Numbered, Picked
from byolx.data.patience import patiently
from byolx.data.splits import stratified_holdout

SPLITS = ("train", "test")
SPLIT_SEED = 0
"""The seed of every held-out share here: fixed, so that a data set has one test split."""

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_CLASSES = (
  "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
  "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


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


def digits(split: str, test_share: float = 0.2) -> ArraySource:
  """scikit-learn's handwritten digits: 8 x 8, ten classes, 1437 for training and 360 for test.

  Args:
    split: 'train' or 'test'.
    test_share: which share is held out, the same proportion of every class.

  Raises:
    ValueError: unknown split, or a share outside [0, 1).
  """
  check_split(split)
  table = _digits_table()
  labels = table[:, -1].astype(np.int32)
  chosen = stratified_holdout(labels, test_share, SPLIT_SEED)[SPLITS.index(split)]
  images = np.rint(table[chosen, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  return ArraySource("digits", images, labels[chosen], tuple(str(i) for i in range(10)))


def _digits_table() -> np.ndarray:
  """The file that `sklearn.datasets.load_digits` reads; to import scikit-learn would take seconds."""
  package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
  with gzip.open(Path(package) / "datasets" / "data" / "digits.csv.gz", "rt") as file:
    return np.loadtxt(file, delimiter=",")


def fashion_mnist(folder: str | Path | None, split: str) -> ArraySource:
  """Fashion-MNIST: 28 x 28, ten classes, 60,000 for training and 10,000 for test.

  Args:
    folder: where the four `.gz` files lie; None or '' is where Debian's package puts them.
    split: 'train' or 'test'.

  Raises:
    ValueError: unknown split, or a file that is missing or not what it should be.
  """
  check_split(split)
  folder = Path(folder or FASHION_MNIST_FOLDER)
  prefix = "train" if split == "train" else "t10k"
  images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (28, 28))
  labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", ())
  if len(images) != len(labels):
    raise ValueError(
      f"{folder} holds {len(images)} {split} images and {len(labels)} labels; expected as many"
    )
  if len(labels) and labels.max() >= 10:
    raise ValueError(f"{folder}: a {split} label is {labels.max()}; expected classes 0 to 9")
  return ArraySource("fashion_mnist", images, labels.astype(np.int32), FASHION_MNIST_CLASSES)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
  """Reads a compressed IDX file of uint8 items of the given shape; the header must fit exactly."""
  try:
    data = gzip.decompress(path.read_bytes())
  except FileNotFoundError:
    raise ValueError(
      f"{path} does not exist; install the package dataset-fashion-mnist (apt-get install"
      " dataset-fashion-mnist), or set data.folder to the folder of its four .gz files"
    ) from None
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: {error}; expected a whole gzip file in IDX format") from error
  start = 8 + 4 * len(shape)
  magic = bytes((0, 0, 8, 1 + len(shape)))
  if data[:4] != magic:
    raise ValueError(f"{path} starts with {data[:4].hex()}; expected the IDX magic {magic.hex()}")
  dims = tuple(np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">u4").tolist())
  if dims[1:] != shape:
    raise ValueError(f"{path} holds items of shape {dims[1:]}; expected {shape}")
  expected = start + math.prod(dims)
  if len(data) != expected:
    raise ValueError(f"{path} unpacks to {len(data)} bytes; expected {expected} for shape {dims}")
  return np.frombuffer(data, np.uint8, offset=start).reshape(dims)
