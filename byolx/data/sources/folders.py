"""Opens folders of image files as data sources, with one function for each layout:

  image_folder   one subfolder per class, or images without labels
  imagenet       train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
  places365      the text files places365_train_standard.txt and places365_val.txt, and the images

wnid is a WordNet id such as n01440764, the name of a class folder of ImageNet. All file names are read
when a source is opened, several class folders in parallel. An image is opened only when its example is
read. If the image cannot be decoded, the read raises DecodeError.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byolx.data.decode import EXTENSIONS, is_image_name
from byolx.data.sources.base import SPLIT_SEED, SPLITS, FileSource, check_split
from byolx.data.sources.names import Names
from byolx.data.splits import stratified_holdout

logger = logging.getLogger("byolx")

_LISTING_THREADS = 8
"""Number of threads that list class folders in parallel, which hides the latency of network disks."""

_EXPECTED = (
  "a folder with one subfolder of images per class, or with images, or with train/ and test/ (or"
  f" val/) of these; extensions {', '.join(sorted(EXTENSIONS))}"
)
_IMAGENET = "a folder with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, wnids such as n01440764"
_PLACES365 = (
  "the folder of places365_train_standard.txt, places365_val.txt and the images they list"
)


def image_folder(folder: str | Path, split: str, test_share: float = 0.2) -> FileSource:
  """Opens a folder of images as a data source.

  Files with the extension of an image (decode.EXTENSIONS) are used, except hidden ones.

  The first of these layouts that fits is used:
    - Subfolders `train` and `test` (or `val`), each in one of the layouts below, are the splits. If
      `test` and `val` both exist, the test split is `test`, or `val` if only `val` has class
      folders.
    - If a subfolder has an image at any depth, each subfolder is one class. The classes are sorted by
      name. Images beside the subfolders are ignored.
    - Images without such subfolders are unlabelled.
  If the two splits do not have their own folders, `test_share` of each class is held out as the test
  split. These images are chosen by a hash of the file names. If `train` is the only subfolder, its images
  are divided this way.

  Args:
    folder: path of the folder; the field data.folder.
    split: name of the split, 'train' or 'test'.
    test_share: share of each class in the test split, 0 <= share < 1.

  Raises:
    ValueError: the split is unknown; the folder does not exist; there is no image in the split; the
      test split has a class that the training split does not have.
  """
  check_split(split)
  root = _existing(folder, _EXPECTED)
  test = _test_folder(root)
  if test is None:
    root = _only_train(root)
    listing = _list_tree(root)
    files = listing.files
    parts = stratified_holdout(listing.labels, test_share, SPLIT_SEED, files)
    indices = parts[SPLITS.index(split)]
    listing = listing._replace(files=files.take(indices), labels=listing.labels[indices])
    total = len(files)
  else:
    listing = _list_tree(root / "train")
    if split == "test":
      listing = _relabelled(_list_tree(test), listing.classes, test)
    root = root / "train" if split == "train" else test
    total = len(listing.files)
  if not len(listing.files):
    raise ValueError(
      f"data.folder is {str(folder)!r}, whose {split} split has no image"
      f" ({total} found, data.test_share {test_share}); expected {_EXPECTED}"
    )
  return _source("image_folder", root, split, listing)


def imagenet(folder: str | Path, split: str) -> FileSource:
  """Opens ImageNet (ILSVRC 2012), or a part of it, from a folder with `train` and `val`.

  The whole set has 1,281,167 training and 50,000 test images of 1000 classes.

  The classes are the folders in `train`, which are named by WordNet ids (wnids). They are sorted by
  name, which gives the usual class numbers 0 to 999.

  Args:
    folder: path of the folder that contains `train` and `val`; the field data.folder.
    split: name of the split: 'train', or 'test' for the images in `val`.

  Raises:
    ValueError: the split is unknown; the folder does not exist; `train` or `val` is missing or has
      subfolders that are not wnids; `val` has a class that `train` does not have; there is no image.
  """
  check_split(split)
  root = _existing(folder, _IMAGENET)
  classes = _wnids(root, "train")
  root = root / ("train" if split == "train" else "val")
  wnids = classes if split == "train" else _wnids(root.parent, "val")
  listing = _relabelled(_list_classes(root, wnids), classes, root)
  if not len(listing.files):
    raise ValueError(
      f"data.folder is {str(folder)!r}, whose {root.name}/ has {len(wnids)} class folders without"
      f" an image; expected {_IMAGENET}"
    )
  return _source("imagenet", root, split, listing)


def places365(folder: str | Path, split: str) -> FileSource:
  """Opens Places365-Standard: 1,803,460 training images, 36,500 test images (`val`), 365 classes.

  The files and their classes are read from `places365_train_standard.txt` or `places365_val.txt`.
  Training images are searched in `data_256_standard`, `data_large_standard`, `data_256`, `data_large`,
  `train` and the folder itself, test images in `val_256`, `val_large`, `val` and the folder itself. The
  first of these folders that has one of the first 100 files of the list is used, and logged. Class
  names are read from `categories_places365.txt`; if this file is missing, they are the names of the
  folders in the training list.

  Args:
    folder: path of the folder that has these text files; the field data.folder.
    split: name of the split: 'train', or 'test' for the images in `val`.

  Raises:
    ValueError: the split is unknown; the folder, a list or the folder of images does not exist; a line
      of a list is not a file and a class number; a class number has no name.
  """
  check_split(split)
  root = _existing(folder, _PLACES365)
  files, labels = _read_list(root / _PLACES365_LISTS[split])
  classes = _places(root, files, labels, split)
  if max(labels) >= len(classes):
    raise ValueError(
      f"{root / _PLACES365_LISTS[split]} has the class {max(labels)}; expected 0 to"
      f" {len(classes) - 1}"
    )
  trees = _PLACES365_TREES[split]
  tree = next((root / t for t in trees if any((root / t / f).is_file() for f in files[:100])), None)
  if tree is None:
    raise ValueError(
      f"data.folder is {str(folder)!r}, where {_PLACES365_LISTS[split]} begins with {files[0]!r},"
      f" which is not in {', '.join(t + '/' for t in trees if t)} or the folder itself; expected it"
      " in one of these"
    )
  listing = _Listing(Names.of(files), np.array(labels, np.int32), classes, Counter())
  return _source("places365", tree, split, listing)


_PLACES365_LISTS = {"train": "places365_train_standard.txt", "test": "places365_val.txt"}
_PLACES365_TREES = {
  "train": ("data_256_standard", "data_large_standard", "data_256", "data_large", "train", ""),
  "test": ("val_256", "val_large", "val", ""),
}


# 1. Listing.


class _Listing(NamedTuple):
  """Image files below a folder.

  Attributes:
    files: paths of the images, relative to the folder.
    labels: class of each image, an index of `classes`; -1 if it is unlabelled.
    classes: names of the classes, empty for unlabelled images.
    ignored: number of files that are not used, by kind, such as their extension.
  """

  files: Names
  labels: np.ndarray
  classes: tuple[str, ...]
  ignored: Counter


def _list_tree(folder: Path) -> _Listing:
  """Lists the images in the class folders of `folder`.

  If the subfolders have no image, the images in `folder` itself are listed, without labels.
  """
  ignored = Counter()
  flat, subfolders = [], []
  for entry in _entries(folder):
    if entry.is_dir():
      subfolders.append(entry.name)
    elif is_image_name(entry.name):
      flat.append(entry.name)
    else:
      ignored[_kind(entry.name)] += 1
  listing = _list_classes(folder, sorted(subfolders))
  ignored += listing.ignored
  if not len(listing.files):
    return _Listing(Names.of(sorted(flat)), np.full(len(flat), -1, np.int32), (), ignored)
  if flat:
    ignored["images beside the class folders"] += len(flat)
  return listing._replace(ignored=ignored)


def _list_classes(folder: Path, classes: Sequence[str]) -> _Listing:
  """Lists the images in the class folders of `folder`; the label of an image is an index of `classes`."""
  with ThreadPoolExecutor(_LISTING_THREADS) as pool:
    parts = list(pool.map(lambda name: _images_below(folder, name), classes))
  files = Names.joined([files for files, _ in parts])
  labels = np.repeat(np.arange(len(parts), dtype=np.int32), [len(files) for files, _ in parts])
  ignored = sum((ignored for _, ignored in parts), Counter())
  return _Listing(files, labels, tuple(classes), ignored)


def _images_below(folder: Path, name: str) -> tuple[Names, Counter]:
  """Lists the images at any depth below `folder / name`.

  Links are followed, but no folder is listed twice.

  Returns:
    The sorted paths of the images, relative to `folder`; and the number of other files by extension.
  """
  files, ignored, visited, pending = [], Counter(), set(), [name]
  while pending:
    relative = pending.pop()
    path = folder / relative
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in visited:  # a link to a parent folder
      continue
    visited.add((status.st_dev, status.st_ino))
    subfolders = []
    for entry in _entries(path):
      if entry.is_dir():
        subfolders.append(f"{relative}/{entry.name}")
      elif is_image_name(entry.name):
        files.append(f"{relative}/{entry.name}")
      else:
        ignored[_kind(entry.name)] += 1
    pending.extend(sorted(subfolders, reverse=True))
  return Names.of(sorted(files)), ignored


def _entries(folder: Path) -> list[os.DirEntry]:
  """Returns the files and subfolders of a folder, except hidden ones, unsorted.

  Raises:
    ValueError: the folder cannot be listed.
  """
  try:
    with os.scandir(folder) as entries:
      return [entry for entry in entries if not entry.name.startswith(".")]
  except OSError as error:
    raise ValueError(f"{folder} cannot be listed: {error.strerror}; expected a folder") from error


def _subfolders(folder: Path) -> list[str]:
  return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _kind(name: str) -> str:
  return os.path.splitext(name)[1].lower() or "without extension"


def _existing(folder: str | Path, expected: str) -> Path:
  """Checks that `folder`, the value of data.folder, is an existing folder, and returns its path.

  Args:
    folder: path to check.
    expected: description of a correct folder, for the error message.

  Raises:
    ValueError: `folder` is not an existing folder.
  """
  if not str(folder) or not os.path.isdir(folder):
    problem = "is not a folder" if str(folder) and os.path.exists(folder) else "does not exist"
    raise ValueError(f"data.folder is {str(folder)!r}, which {problem}; expected {expected}")
  return Path(folder)


def _relabelled(listing: _Listing, classes: Sequence[str], folder: Path) -> _Listing:
  """Returns the images of a split with new labels, which are indices of the training split's classes.

  Args:
    listing: images of a split; their labels are indices of `listing.classes`.
    classes: class names of the training split.
    folder: path of the images, for the error message.

  Raises:
    ValueError: an image has a class that is not in `classes`.
  """
  classes = tuple(classes)
  if not listing.classes:
    return listing._replace(classes=classes)
  label_of = {name: label for label, name in enumerate(classes)}
  used = [listing.classes[label] for label in np.unique(listing.labels)]
  if unknown := sorted(set(used) - set(classes)):
    raise ValueError(
      f"{folder} has the class {unknown[0]!r}, which train/ does not have;"
      f" expected some of its {len(classes)} classes"
    )
  new_labels = np.array([label_of.get(name, -1) for name in listing.classes], np.int32)
  return listing._replace(labels=new_labels[listing.labels], classes=classes)


def _source(name: str, root: Path, split: str, listing: _Listing) -> FileSource:
  kinds = ", ".join(f"{count} {kind}" for kind, count in listing.ignored.most_common(5))
  logger.info(
    "%s: %d images, %d classes in the %s split; %d other files ignored%s",
    root, len(listing.files), len(listing.classes), split, sum(listing.ignored.values()),
    f" ({kinds})" if kinds else "",
  )  # fmt: skip
  return FileSource(name, str(root), listing.files, listing.labels, listing.classes)


# 2. Layouts.


def _test_folder(root: Path) -> Path | None:
  """Returns the path of the test split's folder. Returns None if a split has no folder in `root`."""
  if not (root / "train").is_dir():
    return None
  folders = [root / name for name in ("test", "val") if (root / name).is_dir()]
  return ([folder for folder in folders if _subfolders(folder)] or folders or [None])[0]


def _only_train(root: Path) -> Path:
  """Returns the path of the images: `root / "train"` if it is the only subfolder, else `root`."""
  return root / "train" if _subfolders(root) == ["train"] else root


def _wnids(root: Path, split: str) -> list[str]:
  """Returns the sorted names of ImageNet's class folders in `root / split`.

  The names are WordNet ids (wnids), such as n01440764.

  Args:
    root: path of the data set's folder.
    split: name of the subfolder, 'train' or 'val'.

  Raises:
    ValueError: the subfolder is missing or empty, or has a folder that is not named by a wnid.
  """
  folder = root / split
  if not folder.is_dir():
    subfolders = ", ".join(_subfolders(root)[:3]) or "no subfolder"
    raise ValueError(
      f"data.folder is {str(root)!r}, which has no {split}/ (found: {subfolders});"
      f" expected {_IMAGENET}"
    )
  names = _subfolders(folder)
  if not names:
    files = sorted(entry.name for entry in _entries(folder))
    but = f", but {len(files)} files such as {files[0]}" if files else ""
    raise ValueError(
      f"{folder} has no class folders{but}; expected the images sorted into {split}/<wnid>/, such"
      f" as {split}/n01440764/"
    )
  if other := [name for name in names if not re.fullmatch(r"n\d{8}", name)]:
    raise ValueError(
      f"{folder} has the folder {other[0]!r} ({len(other)} of {len(names)} are not wnids); expected"
      " only wnids such as n01440764; for other classes set data.source=image_folder"
    )
  return names


def _read_list(path: Path) -> tuple[list[str], list[int]]:
  """Reads a list of Places365, with one line `file class-number` per image.

  Returns:
    The files, without a leading slash, and their class numbers.

  Raises:
    ValueError: the list is missing or empty, or a line has another form.
  """
  try:
    lines = path.read_bytes().decode().splitlines()
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}; expected {_PLACES365}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: {error}; expected a file and a class in every line") from error
  files, labels = [], []
  for number, line in enumerate(lines, 1):
    file, _, label = line.rpartition(" ")
    if not file or not label.isdecimal():
      raise ValueError(
        f"{path}, line {number} is {line!r}; expected a file and a class, such as"
        " '/a/airfield/00000001.jpg 0'"
      )
    files.append(file.removeprefix("/"))
    labels.append(int(label))
  if not files:
    raise ValueError(f"{path} is empty; expected a file and a class in every line")
  return files, labels


def _places(root: Path, files: list[str], labels: list[int], split: str) -> tuple[str, ...]:
  """Returns the class names of Places365, such as `airfield`, in the order of the class numbers.

  The names are read from `categories_places365.txt`. If this file is missing, they are the names of the
  folders in the training list.

  Args:
    root: path of the data set's folder.
    files, labels: files and class numbers in the list of `split`.
    split: name of the split, 'train' or 'test'.

  Raises:
    ValueError: a class number has no name.
  """
  path = root / "categories_places365.txt"
  if path.is_file():
    folder_of = dict(zip(*reversed(_read_list(path))))
  else:
    path = root / _PLACES365_LISTS["train"]
    if split == "test":
      files, labels = _read_list(path)
    folder_of = {label: os.path.dirname(file) for label, file in dict(zip(labels, files)).items()}
  if missing := set(range(max(folder_of))) - set(folder_of):
    raise ValueError(f"{path} has no class {min(missing)}; expected all from 0 to {max(folder_of)}")
  # Folders such as a/airfield are sorted by their first letter.
  return tuple(re.sub("^[a-z]/", "", folder_of[number]) for number in range(len(folder_of)))
