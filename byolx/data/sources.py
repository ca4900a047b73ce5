"""What is on disk (or inside scikit-learn), as random-access examples.

A source knows its labels and classes without decoding an image, gives any example by its number,
and can be pickled, so that worker processes can have it. Every source yields uint8 RGB pixels.

  digits          scikit-learn's 1797 images of 8 x 8 pixels: nothing to download
  fashion_mnist   70,000 images of 28 x 28, from Debian's package dataset-fashion-mnist
  image_folder    a folder of one's own: one subfolder per class, or images without labels

ImageNet is `image_folder` on a folder with `train/<class>/` and `val/<class>/`.
"""

import gzip
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from byolx.data.decode import EXTENSIONS, is_image_name, read_image
from byolx.data.splits import stratified_holdout

logger = logging.getLogger("byolx")

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
  """

  name: str
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Raises DecodeError if the example cannot be read."""


@dataclass(frozen=True, eq=False)
class ArraySource:
  """Grey images of one size, held in memory."""

  name: str
  images: UInt8[np.ndarray, "n h w"]
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    image = np.repeat(self.images[index][..., None], 3, axis=2)
    return Example(image, int(self.labels[index]), f"{self.name}/{index}")


@dataclass(frozen=True, eq=False)
class FileSource:
  """Image files; `files` are relative to `folder`."""

  name: str
  folder: str
  files: tuple[str, ...]
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Example:
    path = os.path.join(self.folder, self.files[index])
    return Example(read_image(path), int(self.labels[index]), path)


def digits(split: str, test_share: float = 0.2) -> ArraySource:
  """scikit-learn's handwritten digits: 8 x 8, ten classes, 1437 for training and 360 for test.

  Args:
    split: 'train' or 'test'.
    test_share: which share is held out, the same proportion of every class.

  Raises:
    ValueError: unknown split, or a share outside [0, 1).
  """
  from sklearn.datasets import load_digits  # half a second, which only this source should cost

  _check_split(split)
  data = load_digits()
  labels = data.target.astype(np.int32)
  chosen = stratified_holdout(labels, test_share, SPLIT_SEED)[SPLITS.index(split)]
  images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
  return ArraySource("digits", images, labels[chosen], tuple(str(i) for i in range(10)))


def fashion_mnist(folder: str | Path | None, split: str) -> ArraySource:
  """Fashion-MNIST: 28 x 28, ten classes, 60,000 for training and 10,000 for test.

  Args:
    folder: where the four `.gz` files lie; None or '' is where Debian's package puts them.
    split: 'train' or 'test'.

  Raises:
    ValueError: unknown split, or a file that is missing or not what it should be.
  """
  _check_split(split)
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


def image_folder(folder: str | Path, split: str, test_share: float = 0.2) -> FileSource:
  """Images in a folder, found by extension (see decode.EXTENSIONS), hidden files left out.

  Layouts, the first that fits:
    - subfolders `train` and `test` (or `val`), each laid out as below: those are the splits. If
      both are there, `test` is the test split unless it alone has no class folders.
    - subfolders with images in them, at any depth: one class each, in order of name. Images beside
      them are ignored.
    - images only: unlabelled.
  Without a folder for the test split, `test_share` of every class is held out, chosen by the
  files' names (of what is in `train`, if that is the only subfolder).

  The files are not opened. One that cannot be decoded raises DecodeError when it is asked for.

  Args:
    folder: the field data.folder.
    split: 'train' or 'test'.
    test_share: 0 <= share < 1.

  Raises:
    ValueError: unknown split; no such folder; no image in it or in the split; a class of the test
      split that is not in the training split.
  """
  _check_split(split)
  root = Path(folder)
  if not str(folder) or not root.is_dir():
    what = "is not a folder" if str(folder) and root.exists() else "does not exist"
    raise ValueError(f"data.folder is {str(folder)!r}, which {what}; expected {_EXPECTED}")
  test = _test_folder(root)
  if test is None:
    root = _only_train(root)
    scan = _scan(root)
    chosen = stratified_holdout(scan.labels, test_share, SPLIT_SEED, scan.files)
    source = _file_source(root, scan, chosen[SPLITS.index(split)])
  else:
    scan = _scan(root / "train")
    if split == "test":
      scan = _relabelled(_scan(test), scan.classes, test)
    root = root / "train" if split == "train" else test
    source = _file_source(root, scan, np.arange(len(scan.files)))
  if not len(source):
    raise ValueError(
      f"data.folder is {str(folder)!r}, whose {split} split has no image"
      f" ({len(scan.files)} found, data.test_share {test_share}); expected {_EXPECTED}"
    )
  ignored = sum(scan.ignored.values())
  kinds = ", ".join(f"{count} {kind}" for kind, count in scan.ignored.most_common(5))
  logger.info(
    "%s: %d images, %d classes in the %s split; %d other files ignored%s",
    root, len(source), len(source.classes), split, ignored, f" ({kinds})" if kinds else "",
  )  # fmt: skip
  return source


_EXPECTED = (
  "a folder with one subfolder of images per class, or with images, or with train/ and test/ (or"
  f" val/) of these; extensions {', '.join(sorted(EXTENSIONS))}"
)


class _Scan(NamedTuple):
  """The image files below a folder: relative names, classes, and a count of what else was there."""

  files: tuple[str, ...]
  labels: np.ndarray
  classes: tuple[str, ...]
  ignored: Counter


def _scan(folder: Path) -> _Scan:
  """Lists a folder of class folders, or a flat folder of images, in order of name."""
  ignored = Counter()
  flat, subfolders = [], []
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    if entry.name.startswith("."):
      continue
    if entry.is_dir():
      subfolders.append(entry.name)
    elif is_image_name(entry.name):
      flat.append(entry.name)
    else:
      ignored[_kind(entry.name)] += 1
  nested = [(name, sorted(_images_below(folder, name, ignored))) for name in subfolders]
  if not any(files for _, files in nested):
    return _Scan(tuple(flat), np.full(len(flat), -1, np.int32), (), ignored)
  if flat:
    ignored["images beside the class folders"] += len(flat)
  labels = np.repeat(np.arange(len(nested), dtype=np.int32), [len(files) for _, files in nested])
  files = tuple(file for _, files in nested for file in files)
  return _Scan(files, labels, tuple(name for name, _ in nested), ignored)


def _images_below(folder: Path, name: str, ignored: Counter) -> Iterator[str]:
  """Names, relative to `folder`, of all images below `folder / name`; links are followed."""
  seen = set()
  for path, subfolders, files in os.walk(folder / name, followlinks=True):
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
      subfolders.clear()
      continue
    seen.add((status.st_dev, status.st_ino))
    subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
    for file in files:
      if file.startswith("."):
        continue
      if is_image_name(file):
        yield os.path.relpath(os.path.join(path, file), folder)
      else:
        ignored[_kind(file)] += 1


def _kind(name: str) -> str:
  return os.path.splitext(name)[1].lower() or "without extension"


def _test_folder(root: Path) -> Path | None:
  """The folder of the test split, if `root` has folders of splits."""
  if not (root / "train").is_dir():
    return None
  found = [root / name for name in ("test", "val") if (root / name).is_dir()]
  return ([folder for folder in found if _subfolders(folder)] or found or [None])[0]


def _only_train(root: Path) -> Path:
  """`root / "train"` where that is all there is: otherwise it would pass for the only class."""
  return root / "train" if _subfolders(root) == ["train"] else root


def _subfolders(folder: Path) -> list[str]:
  entries = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
  return sorted(entry.name for entry in entries if entry.is_dir())


def _relabelled(scan: _Scan, classes: tuple[str, ...], folder: Path) -> _Scan:
  """The scan of the test split with the numbers that the training split gives to the classes."""
  if not scan.classes:
    return scan._replace(classes=classes)
  used = [scan.classes[label] for label in np.unique(scan.labels)]
  if unknown := sorted(set(used) - set(classes)):
    raise ValueError(
      f"{folder} has the class {unknown[0]!r}, which train/ does not have;"
      f" expected some of its {len(classes)} classes"
    )
  number = np.array([classes.index(name) if name in classes else -1 for name in scan.classes])
  return scan._replace(labels=number[scan.labels].astype(np.int32), classes=classes)


def _file_source(root: Path, scan: _Scan, chosen: np.ndarray) -> FileSource:
  files = tuple(scan.files[i] for i in chosen)
  return FileSource("image_folder", str(root), files, scan.labels[chosen], scan.classes)


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


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

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.indices[index])]
