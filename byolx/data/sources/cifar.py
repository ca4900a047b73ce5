"""Reads CIFAR-10 and CIFAR-100 from the pickle files of their "python version".

Loading a pickle can run arbitrary code. These files are therefore read by a restricted unpickler. It
accepts only the Python names that a pickled numpy array needs, and replaces each of them by a harmless
class or function (a stand-in). A file that refers to any other name is refused. The arrays are checked
before use.
"""

import io
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byolx.data.sources.base import ArraySource, check_split

logger = logging.getLogger("byolx")

_PIXELS = 3 * 32 * 32


class _Layout(NamedTuple):
  """Names of the files of CIFAR-10 or CIFAR-100, and the keys of labels and classes in these files."""

  name: str
  folder: str
  meta: str
  train: tuple[str, ...]
  test: tuple[str, ...]
  labels: str
  classes: str


_CIFAR10 = _Layout(
  name="cifar10",
  folder="cifar-10-batches-py",
  meta="batches.meta",
  train=tuple(f"data_batch_{i}" for i in range(1, 6)),
  test=("test_batch",),
  labels="labels",
  classes="label_names",
)
_CIFAR100 = _Layout(
  name="cifar100",
  folder="cifar-100-python",
  meta="meta",
  train=("train",),
  test=("test",),
  labels="fine_labels",
  classes="fine_label_names",
)


def cifar10(folder: str | Path, split: str) -> ArraySource:
  """Reads CIFAR-10: 32 x 32 pixels, 10 classes, 50,000 training and 10,000 test images.

  Args:
    folder: path of `cifar-10-batches-py` or of its parent; the field data.folder.
    split: name of the split, 'train' or 'test'.

  Raises:
    ValueError: the split is unknown, or a file is missing, damaged or of another format.
  """
  return _read(_CIFAR10, folder, split)


def cifar100(folder: str | Path, split: str) -> ArraySource:
  """Reads CIFAR-100: 32 x 32 pixels, 100 fine classes, 50,000 training and 10,000 test images.

  Args:
    folder: path of `cifar-100-python` or of its parent; the field data.folder.
    split: name of the split, 'train' or 'test'.

  Raises:
    ValueError: the split is unknown, or a file is missing, damaged or of another format.
  """
  return _read(_CIFAR100, folder, split)


def _read(layout: _Layout, folder: str | Path, split: str) -> ArraySource:
  check_split(split)
  root = Path(folder)
  if (root / layout.folder).is_dir():
    root = root / layout.folder
  if not str(folder) or not (root / layout.meta).is_file():
    files = ", ".join((layout.meta, *layout.train, *layout.test))
    raise ValueError(
      f"data.folder is {str(folder)!r}, which has no {layout.meta}; expected {layout.folder},"
      f" the unpacked python version of the data set, with {files}"
    )
  names = _load(root / layout.meta, layout.classes)[layout.classes]
  if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
    raise ValueError(f"{root / layout.meta}: {layout.classes} is not a list of names")
  classes = tuple(name if isinstance(name, str) else name.decode("latin1") for name in names)
  files = layout.train if split == "train" else layout.test
  parts = [_read_batch(root / file, layout.labels, len(classes)) for file in files]
  images, labels = (np.concatenate(part) for part in zip(*parts))
  logger.info("%s: %d images, %d classes in the %s split", root, len(images), len(classes), split)
  return ArraySource(layout.name, images, labels, classes)


def _read_batch(path: Path, labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads one file; returns its images, uint8 [n 32 32 3], and labels, int32 [n].

  Args:
    path: path of the file.
    labels_key: key of the labels in the pickled dict.
    classes: number of classes.

  Raises:
    ValueError: the file is missing or damaged, or a label is not 0 to classes - 1.
  """
  batch = _load(path, "data", labels_key)
  data, labels = batch["data"], batch[labels_key]
  pixels = data.pixels() if isinstance(data, _Array) else None
  if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
    problem = "not an array of bytes" if pixels is None else f"of shape {pixels.shape}"
    raise ValueError(f"{path}: data is {problem}; expected uint8 of shape (n, {_PIXELS})")
  if not isinstance(labels, list) or not all(type(label) is int for label in labels):
    raise ValueError(f"{path}: {labels_key} is not a list of integers")
  if len(labels) != len(pixels):
    raise ValueError(
      f"{path} holds {len(pixels)} images and {len(labels)} labels; expected one each"
    )
  if min(labels) < 0 or max(labels) >= classes:
    raise ValueError(
      f"{path}: labels go from {min(labels)} to {max(labels)}; expected 0 to {classes - 1}"
    )
  images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return np.ascontiguousarray(images), np.array(labels, np.int32)


# Restricted unpickling.


def _load(path: Path, *keys: str) -> dict[str, Any]:
  """Loads a pickled dict with the restricted unpickler, and checks that it has the given keys.

  The keys of the result are strings. A value that Python 2 wrote as a string is bytes.

  Raises:
    ValueError: the file is missing or damaged, or refers to a forbidden Python name.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read: {error.strerror}; expected a file of CIFAR"
    ) from error
  try:
    content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
  except _RefusedError as error:
    raise ValueError(f"{path} refers to {error}; expected nothing but arrays in it") from None
  except Exception as error:  # damaged pickles raise nearly anything
    raise ValueError(f"{path} is damaged ({error}); expected a pickle of CIFAR") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict")
  values = {key.decode("latin1"): content[key] for key in content if isinstance(key, bytes)}
  values |= {key: content[key] for key in content if isinstance(key, str)}
  if missing := [key for key in keys if key not in values]:
    raise ValueError(f"{path} has no {missing[0]!r}; expected {' and '.join(keys)} in it")
  return values


class _RefusedError(Exception):
  """Error for a pickle that refers to a forbidden Python name.

  Only the names that a pickled numpy array needs are allowed.
  """


class _Unpickler(pickle.Unpickler):
  """Unpickler that replaces the Python names in `_STAND_INS` by harmless ones, and refuses all others."""

  def find_class(self, module: str, name: str) -> Callable:
    stand_in = _STAND_INS.get((module, name))
    if stand_in is None:
      raise _RefusedError(f"{module}.{name}")
    # A new function each time, since a pickle may set attributes on it.
    return lambda *args: stand_in(*args)


class _Array:
  """Replacement for a numpy array while unpickling: keeps the pickled state without interpreting it."""

  def __init__(self, *_: Any):
    self.state = None

  def __setstate__(self, state: Any):
    self.state = state

  def pixels(self) -> np.ndarray | None:
    """Returns the pickled array, or None if its values are not uint8 or do not fit its shape."""
    match self.state:
      case (int(), tuple() as shape, _Dtype(code="u1" | "|u1"), False | 0, bytes() as raw):
        valid = all(type(side) is int and side >= 0 for side in shape)
        if valid and math.prod(shape) == len(raw):
          return np.frombuffer(raw, np.uint8).reshape(shape)
    return None


class _Dtype:
  """Replacement for `numpy.dtype` while unpickling: keeps only the code of the type, such as "u1"."""

  def __init__(self, code: Any = None, *_: Any):
    self.code = code.decode("latin1") if isinstance(code, bytes) else code

  def __setstate__(self, state: Any):
    pass  # the state holds the byte order, which uint8 does not have


def _latin1(text: Any, encoding: Any = None) -> bytes:
  """Replacement for `codecs.encode` while unpickling. Old pickles call that function to make bytes."""
  if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
    raise _RefusedError(f"the encoding {encoding!r}")
  return text.encode("latin1")


_STAND_INS = {
  ("numpy.core.multiarray", "_reconstruct"): _Array,
  ("numpy._core.multiarray", "_reconstruct"): _Array,
  ("numpy", "ndarray"): _Array,
  ("numpy", "dtype"): _Dtype,
  ("_codecs", "encode"): _latin1,
}
