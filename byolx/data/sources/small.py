"""Reads small data sets that come with packages: scikit-learn's digits and Debian's Fashion-MNIST."""

import gzip
import importlib.util
import math
import zlib
from pathlib import Path

import numpy as np

from byolx.data.sources.base import SPLIT_SEED, SPLITS, ArraySource, check_split
from byolx.data.splits import stratified_holdout

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_CLASSES = (
  "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
  "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def digits(split: str, test_share: float = 0.2) -> ArraySource:
  """Reads scikit-learn's handwritten digits: 8 x 8 pixels, 10 classes, 1797 images.

  With the default `test_share`, 1437 of them are training images and 360 are test images.

  Args:
    split: name of the split, 'train' or 'test'.
    test_share: share of the images in the test split, 0 <= share < 1; balanced over the classes.

  Raises:
    ValueError: the split is unknown, or `test_share` is outside [0, 1).
  """
  check_split(split)
  table = _digits_table()
  labels = table[:, -1].astype(np.int32)
  indices = stratified_holdout(labels, test_share, SPLIT_SEED)[SPLITS.index(split)]
  images = np.rint(table[indices, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  return ArraySource("digits", images, labels[indices], tuple(str(i) for i in range(10)))


def _digits_table() -> np.ndarray:
  """Reads the digits' pixels and labels from a file of scikit-learn, without its slow import."""
  package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
  with gzip.open(Path(package) / "datasets" / "data" / "digits.csv.gz", "rt") as file:
    return np.loadtxt(file, delimiter=",")


def fashion_mnist(folder: str | Path | None, split: str) -> ArraySource:
  """Reads Fashion-MNIST: 28 x 28 pixels, 10 classes, 60,000 training and 10,000 test images.

  Args:
    folder: path of the folder that has the four `.gz` files; None or '' for FASHION_MNIST_FOLDER, the
      folder of Debian's package.
    split: name of the split, 'train' or 'test'.

  Raises:
    ValueError: the split is unknown, or a file is missing, damaged or of another format.
  """
  check_split(split)
  folder = Path(folder or FASHION_MNIST_FOLDER)
  prefix = "train" if split == "train" else "t10k"
  images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (28, 28))
  labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", ())
  if len(images) != len(labels):
    raise ValueError(
      f"{folder} holds {len(images)} {split} images and {len(labels)} labels; expected one each"
    )
  if len(labels) and labels.max() >= 10:
    raise ValueError(f"{folder}: a {split} label is {labels.max()}; expected classes 0 to 9")
  return ArraySource("fashion_mnist", images, labels.astype(np.int32), FASHION_MNIST_CLASSES)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
  """Reads a gzip-compressed IDX file of uint8 arrays, and checks its header and size.

  Args:
    path: path of the file.
    shape: expected shape of each array: (28, 28) for images, () for labels.

  Raises:
    ValueError: the file is missing, damaged or of another format.
  """
  try:
    data = gzip.decompress(path.read_bytes())
  except FileNotFoundError:
    raise ValueError(
      f"{path} does not exist; install the package dataset-fashion-mnist (apt-get install"
      " dataset-fashion-mnist), or set data.folder to the folder of its four .gz files"
    ) from None
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: {error}; expected a complete gzip file in IDX format") from error
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
