"""Finds images in folders or tar archives, for conversion by `byolx prepare`.

A tar archive may have the same contents as a folder (folders.image_folder). It has class folders, or
images without labels. Either of these may also be in two folders, `train` and `test` (or `val`). A single
folder around all members, as written by `tar cf photos.tar photos`, is ignored.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64

from byolx.data.decode import DecodeError, read_file
from byolx.data.prepare.tar import Archive, list_archive, one_line, read_member
from byolx.data.sources.folders import image_folder
from byolx.data.sources.names import Names

MAX_BYTES = 2**30
"""Largest size in bytes of an image file; larger files are left out of a prepared set."""

_STAT_THREADS = 16  # parallel, to hide the latency of network disks


@dataclass(frozen=True, eq=False)
class Inputs:
  """Image files of one split, in the order in which `byolx prepare` will store them.

  Attributes:
    split: name of the split, 'train' or 'test'.
    root: path of the folder or of the tar archive.
    names: path of each file, relative to `root`, or to the split's folder inside the archive.
    labels: class of each file, -1 if it is unlabelled.
    sizes: size of each file in bytes.
    offsets: byte offset of each file in the archive; None if `root` is a folder.
  """

  split: str
  root: str
  names: Names
  labels: Int32[np.ndarray, "n"]
  sizes: Int64[np.ndarray, "n"]
  offsets: Int64[np.ndarray, "n"] | None

  def __len__(self) -> int:
    return len(self.names)

  def take(self, indices: Int[np.ndarray, "k"]) -> "Inputs":
    """Returns the files at `indices`, in the order of `indices`."""
    offsets = None if self.offsets is None else self.offsets[indices]
    return Inputs(
      self.split,
      self.root,
      self.names.take(indices),
      self.labels[indices],
      self.sizes[indices],
      offsets,
    )

  def read(self, index: int) -> tuple[bytes, str]:
    """Returns the bytes of one file, and its name for messages, such as `train/cat/1.jpg`.

    Raises:
      DecodeError: the file cannot be read, or is larger than MAX_BYTES.
    """
    name = f"{self.split}/{one_line(self.names[index])}"
    size = int(self.sizes[index])
    if size > MAX_BYTES:
      raise DecodeError(f"{name}: {size} bytes; expected at most {MAX_BYTES}")
    try:
      if self.offsets is not None:
        return read_member(self.root, int(self.offsets[index]), size), name
      return read_file(os.path.join(self.root, self.names[index])), name
    except DecodeError as error:
      # The path is removed, so that `unreadable.txt` is the same on every machine.
      raise DecodeError(f"{name}: {str(error).rpartition(': ')[2]}") from None
    except OSError as error:
      raise DecodeError(f"{name}: {error.strerror or error}") from error


class Collection(NamedTuple):
  """All images that `byolx prepare` converts to one prepared set (a few large files).

  Attributes:
    splits: files of each split by its name: 'train', and 'test' if there is a test split.
    classes: names of the classes, empty for an unlabelled set.
    left_out: one line `name: reason` for each member of an archive that was left out.
  """

  splits: dict[str, Inputs]
  classes: tuple[str, ...]
  left_out: list[str]


def collect(
  source: str | Path, test: str | Path | None = None, test_labels: str | Path | None = None
) -> Collection:
  """Finds the images of the training split and, if there is one, of the test split.

  Args:
    source: path of a folder or tar archive with the training images, or with both splits.
    test: path of a folder or tar archive with the test images; None if `source` has them, or if there is
      no test split.
    test_labels: path of a file with lines `file-name class-name`, for a test split without class
      folders; None if no such file is needed.

  Returns:
    A `Collection`: the files of each split, the names of the classes, and one line for each archive
    member that was left out.

  Raises:
    ValueError: a path does not exist, there is no image, or the arguments, splits, classes and labels
      are inconsistent.
    OSError: an archive cannot be read.
  """
  parts, left_out = _list_path(Path(source))
  if test is not None:
    if "test" in parts:
      raise ValueError(f"{source} has a test split of its own; expected no --test={test}")
    test_parts, more = _list_path(Path(test))
    if "test" in test_parts:
      raise ValueError(f"--test={test} has two splits; expected the images of one")
    parts["test"] = test_parts["train"]
    left_out += more
  (inputs, classes), splits = parts["train"], {}
  splits["train"] = inputs
  if "test" in parts:
    splits["test"] = _labelled_test(*parts["test"], classes, test_labels)
  elif test_labels is not None:
    raise ValueError(
      f"--test_labels={test_labels} was given, but there is no test split; expected --test as well"
    )
  return Collection(splits, classes, left_out)


class _Part(NamedTuple):
  inputs: Inputs
  classes: tuple[str, ...]


def _list_path(path: Path) -> tuple[dict[str, _Part], list[str]]:
  if path.is_dir():
    return _list_folder(path), []
  if not path.exists():
    raise ValueError(f"{path} does not exist; expected a folder or a tar archive")
  archive = list_archive(path)
  parts = _splits_of_archive(path, archive)
  if not len(parts["train"].inputs):
    raise ValueError(f"{path} has no image ({_counts(archive)}); expected at least one")
  return parts, [f"{path.name}/{line}" for line in archive.left_out]


def _counts(archive: Archive) -> str:
  ignored = ", ".join(f"{count} {kind}" for kind, count in archive.ignored.most_common(5))
  return f"{len(archive.images)} found, other files: {ignored or 'none'}"


# Folders.


def _list_folder(root: Path) -> dict[str, _Part]:
  train = image_folder(root, "train", test_share=0.0)
  parts = {"train": _of_files("train", train)}
  has_train_folder = Path(train.folder) != root
  if has_train_folder and any((root / name).is_dir() for name in ("test", "val")):
    parts["test"] = _of_files("test", image_folder(root, "test", test_share=0.0))
  return parts


def _of_files(split: str, source) -> _Part:
  def size(name: str) -> int:
    try:
      return os.stat(os.path.join(source.folder, name)).st_size
    except OSError:
      return 0  # the file is reported as unreadable when it is read

  with ThreadPoolExecutor(_STAT_THREADS) as pool:
    sizes = np.fromiter(pool.map(size, source.names), np.int64, len(source))
  return _Part(
    Inputs(split, source.folder, source.names, source.labels, sizes, None), source.classes
  )


# Archives.


def _splits_of_archive(path: Path, archive: Archive) -> dict[str, _Part]:
  """Returns the images of each split of an archive, by the name of the split.

  If the archive has the folders `train` and `test` (or `val`), these are the splits; otherwise all
  images are training images.
  """
  images, folders = archive.images, archive.folders
  prefix = ""
  while True:  # skip single folders around all members
    top = {name for name in _below(folders, prefix) if "/" not in name}
    if len(top) != 1 or any("/" not in name for name in _below(images, prefix)):
      break
    prefix += f"{top.pop()}/"
  parts = {"train": prefix}
  tests = [name for name in ("test", "val") if name in top]
  if "train" in top and tests:
    nested = [name for name in tests if any(_below(folders, f"{prefix}{name}/"))]
    parts = {"train": f"{prefix}train/", "test": f"{prefix}{(nested or tests)[0]}/"}
  return {split: _of_members(split, path, archive, start) for split, start in parts.items()}


def _below(names, prefix: str) -> list[str]:
  return [name[len(prefix) :] for name in names if name.startswith(prefix) and name != prefix]


def _of_members(split: str, path: Path, archive: Archive, prefix: str) -> _Part:
  """Returns the images of one split of an archive, and the classes of these images.

  Args:
    split: name of the split, 'train' or 'test'.
    path: path of the archive.
    archive: contents of the archive.
    prefix: first part of the names of the split's members, such as `train/`.
  """
  names = _below(archive.images, prefix)
  classes: tuple[str, ...] = ()
  if any("/" in name for name in names):
    archive.ignored["images beside the class folders"] += sum("/" not in name for name in names)
    names = [name for name in names if "/" in name]
    classes = tuple(sorted({name for name in _below(archive.folders, prefix) if "/" not in name}))
  label_of = {name: label for label, name in enumerate(classes)}
  names.sort(key=lambda name: (name.partition("/")[0] if classes else "", name))
  ranges = np.array([archive.images[prefix + name] for name in names], np.int64).reshape(-1, 2)
  labels = np.array([label_of.get(name.partition("/")[0], -1) for name in names], np.int32)
  offsets, sizes = np.ascontiguousarray(ranges.T)
  return _Part(Inputs(split, str(path), Names.of(names), labels, sizes, offsets), classes)


# The labels of the test split.


def _labelled_test(
  inputs: Inputs,
  test_classes: tuple[str, ...],
  classes: tuple[str, ...],
  test_labels: str | Path | None,
) -> Inputs:
  """Relabels the files of the test split by the classes of the training split, and returns the files.

  A new label is an index of `classes`. If both splits are unlabelled, all labels are -1.

  Args:
    inputs: files of the test split; their labels are indices of `test_classes`, or -1.
    test_classes: class names of the test split, empty if it has no class folders.
    classes: class names of the training split.
    test_labels: path of a file with lines `file-name class-name`; None if there is no such file.

  Raises:
    ValueError: the labels are missing, or given by both folders and `test_labels`; or a class is not one
      of the training split.
  """
  root = inputs.root
  has_folders = (inputs.labels >= 0).any()
  if test_labels is not None:
    if has_folders:
      raise ValueError(f"{root} has class folders; expected no --test_labels={test_labels}")
    class_names: Sequence[str] = _read_labels(Path(test_labels), inputs)
  elif has_folders:
    class_names = [test_classes[label] for label in inputs.labels.tolist()]
  elif classes:
    raise ValueError(
      f"{root}, the test split, has no class folders, but the training split has {len(classes)}"
      " classes; expected --test_labels=FILE with lines `file-name class-name`"
    )
  else:
    class_names = []
  label_of = {name: label for label, name in enumerate(classes)}
  if unknown := sorted(set(class_names) - set(classes)):
    raise ValueError(
      f"{root}, the test split, has the class {unknown[0]!r}; expected some of the {len(classes)}"
      " classes of the training split"
    )
  if class_names:
    labels = np.array([label_of[name] for name in class_names], np.int32)
  else:
    labels = np.full(len(inputs), -1, np.int32)
  return Inputs("test", root, inputs.names, labels, inputs.sizes, inputs.offsets)


def _read_labels(path: Path, inputs: Inputs) -> list[str]:
  """Reads a file with lines `file-name class-name`, and returns the class name of each image.

  The folders in the names of the images are ignored.

  Raises:
    ValueError: the file cannot be read, a line has another form, an image has no line, or two lines have
      the same file name.
  """
  class_of, lines = {}, Counter()
  try:
    text = path.read_text(errors="surrogateescape")
  except OSError as error:
    raise ValueError(f"--test_labels={path}: {error.strerror}; expected a file") from error
  for number, line in enumerate(text.splitlines(), 1):
    words = line.split(maxsplit=1)
    if not words:
      continue
    if len(words) != 2:
      raise ValueError(f"{path}, line {number}: {line!r}; expected `file-name class-name`")
    class_of[words[0]] = words[1].strip()
    lines[words[0]] += 1
  files = [name.rpartition("/")[2] for name in inputs.names]
  if twice := [file for file, count in lines.items() if count > 1]:
    raise ValueError(f"{path} has {twice[0]} in several lines; expected one line for each file")
  if missing := [file for file in files if file not in class_of]:
    raise ValueError(
      f"{path} has no line for {missing[0]} and {len(missing) - 1} others of {len(files)} images;"
      " expected lines `file-name class-name`"
    )
  return [class_of[file] for file in files]
