"""What `byolx prepare` is given: a folder or tar archives, as a list of images for each split.

A tar is laid out like a folder (see folders.image_folder): class folders or images only, or both
kinds below `train` and `test` (or `val`). A folder around everything, as `tar cf photos.tar photos`
makes it, does not count.
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
"""Larger files are not read; a photograph has a thousandth of this."""

_STAT_THREADS = 16  # they hide the latency of network disks


@dataclass(frozen=True, eq=False)
class Inputs:
  """The images of one split, in the order in which they are stored.

  Attributes:
    split: 'train' or 'test'.
    root: the folder that names are relative to, or the tar archive.
    names: of the files.
    labels: -1 for none.
    sizes: of the files, in bytes.
    offsets: where they start in the archive; None if `root` is a folder.
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
    """Some of them, in this order."""
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
    """The bytes of a file, and what it is called in messages: `split/name`.

    Raises:
      DecodeError: the file cannot be read.
    """
    name = f"{self.split}/{one_line(self.names[index])}"
    size = int(self.sizes[index])
    if size > MAX_BYTES:
      raise DecodeError(f"{name}: {size} bytes; expected at most {MAX_BYTES}")
    try:
      if self.offsets is not None:
        return read_member(self.root, int(self.offsets[index]), size), name
      return read_file(os.path.join(self.root, self.names[index])), name
    except DecodeError as error:  # it starts with the path, which is another on every machine
      raise DecodeError(f"{name}: {str(error).rpartition(': ')[2]}") from None
    except OSError as error:
      raise DecodeError(f"{name}: {error.strerror or error}") from error


class Collection(NamedTuple):
  """Everything that will be prepared: splits, their classes, and what was left out already."""

  splits: dict[str, Inputs]
  classes: tuple[str, ...]
  left_out: list[str]


def collect(
  source: str | Path, test: str | Path | None = None, test_labels: str | Path | None = None
) -> Collection:
  """Lists all images.

  Args:
    source: a folder, or a tar, of the training images or of both splits.
    test: a folder or a tar of the test split.
    test_labels: a file with lines `file-name class-name`, for a test split without class folders.

  Raises:
    ValueError: there is no image, or splits, classes and labels do not go together.
    OSError: an archive cannot be read.
  """
  found, left_out = _listed(Path(source))
  if test is not None:
    if "test" in found:
      raise ValueError(f"{source} has a test split of its own; expected no --test={test}")
    of_test, more = _listed(Path(test))
    if "test" in of_test:
      raise ValueError(f"--test={test} has two splits; expected the images of one")
    found["test"] = of_test["train"]
    left_out += more
  (inputs, classes), splits = found["train"], {}
  splits["train"] = inputs
  if "test" in found:
    splits["test"] = _labelled_test(*found["test"], classes, test_labels)
  elif test_labels is not None:
    raise ValueError(
      f"--test_labels={test_labels} was given, but no test split is there; see --test"
    )
  return Collection(splits, classes, left_out)


class _Part(NamedTuple):
  inputs: Inputs
  classes: tuple[str, ...]


def _listed(path: Path) -> tuple[dict[str, _Part], list[str]]:
  if path.is_dir():
    return _listed_folder(path), []
  if not path.exists():
    raise ValueError(f"{path} does not exist; expected a folder or a tar archive")
  archive = list_archive(path)
  parts = _laid_out(path, archive)
  if not len(parts["train"].inputs):
    raise ValueError(f"{path} has no image ({_counts(archive)}); expected some")
  return parts, [f"{path.name}/{line}" for line in archive.left_out]


def _counts(archive: Archive) -> str:
  ignored = ", ".join(f"{count} {kind}" for kind, count in archive.ignored.most_common(5))
  return f"{len(archive.images)} found, other files: {ignored or 'none'}"


# Folders.


def _listed_folder(root: Path) -> dict[str, _Part]:
  train = image_folder(root, "train", test_share=0.0)
  parts = {"train": _of_files("train", train)}
  inside = Path(train.folder) != root
  if inside and any((root / name).is_dir() for name in ("test", "val")):
    parts["test"] = _of_files("test", image_folder(root, "test", test_share=0.0))
  return parts


def _of_files(split: str, source) -> _Part:
  def size(name: str) -> int:
    try:
      return os.stat(os.path.join(source.folder, name)).st_size
    except OSError:
      return 0  # it will be listed when it is read

  with ThreadPoolExecutor(_STAT_THREADS) as pool:
    sizes = np.fromiter(pool.map(size, source.names), np.int64, len(source))
  return _Part(
    Inputs(split, source.folder, source.names, source.labels, sizes, None), source.classes
  )


# Archives.


def _laid_out(path: Path, archive: Archive) -> dict[str, _Part]:
  """The splits of an archive, by the rules of folders.image_folder."""
  images, folders = archive.images, archive.folders
  prefix = ""
  while True:  # takes the folders around everything away
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
  """The images of an archive whose names start with `prefix`."""
  names = _below(archive.images, prefix)
  classes: tuple[str, ...] = ()
  if any("/" in name for name in names):
    archive.ignored["images beside the class folders"] += sum("/" not in name for name in names)
    names = [name for name in names if "/" in name]
    classes = tuple(sorted({name for name in _below(archive.folders, prefix) if "/" not in name}))
  number = {name: label for label, name in enumerate(classes)}
  names.sort(key=lambda name: (name.partition("/")[0] if classes else "", name))
  where = np.array([archive.images[prefix + name] for name in names], np.int64).reshape(-1, 2)
  labels = np.array([number.get(name.partition("/")[0], -1) for name in names], np.int32)
  offsets, sizes = np.ascontiguousarray(where.T)
  return _Part(Inputs(split, str(path), Names.of(names), labels, sizes, offsets), classes)


# The labels of the test split.


def _labelled_test(
  inputs: Inputs,
  own: tuple[str, ...],
  classes: tuple[str, ...],
  test_labels: str | Path | None,
) -> Inputs:
  """The test split with the training split's numbers for the classes.

  Args:
    inputs: whose labels number the classes `own`, which is empty if they have none.
    own: class names of the test split.
    classes: class names of the training split.
    test_labels: the field of `collect`.
  """
  root = inputs.root
  has_folders = (inputs.labels >= 0).any()
  if test_labels is not None:
    if has_folders:
      raise ValueError(f"{root} has class folders; expected no --test_labels={test_labels}")
    of_each: Sequence[str] = _read_labels(Path(test_labels), inputs)
  elif has_folders:
    of_each = [own[label] for label in inputs.labels.tolist()]
  elif classes:
    raise ValueError(
      f"{root}, the test split, has no class folders, but the training split has {len(classes)}"
      " classes; expected --test_labels=FILE with lines `file-name class-name`"
    )
  else:
    of_each = []
  number = {name: label for label, name in enumerate(classes)}
  if unknown := sorted(set(of_each) - set(classes)):
    raise ValueError(
      f"{root}, the test split, has the class {unknown[0]!r}; expected some of the {len(classes)}"
      " classes of the training split"
    )
  if of_each:
    labels = np.array([number[name] for name in of_each], np.int32)
  else:
    labels = np.full(len(inputs), -1, np.int32)
  return Inputs("test", root, inputs.names, labels, inputs.sizes, inputs.offsets)


def _read_labels(path: Path, inputs: Inputs) -> list[str]:
  """The class name of every input, by its file name."""
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
