"""Reads data sets that TensorFlow Datasets (TFDS) wrote as ArrayRecord, without TensorFlow and TFDS.

The folder of a set holds `dataset_info.json` (splits, and the number of records in each file),
`features.json` (the features of a record), the files `NAME-SPLIT.array_record-00000-of-00008` and
so on, and the class names in `label.labels.txt`. A record is a serialised tf.Example. Only its
image, label and file name are used. This line of Python writes such a set:

  tensorflow_datasets.builder("imagenet2012", file_format="array_record").download_and_prepare()
"""

import functools
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32, Int64

from byolx.data.decode import DecodeError, decode
from byolx.data.sources import tf_example
from byolx.data.sources.array_record import Readers, read_record
from byolx.data.sources.base import Example, check_split
from byolx.data.sources.names import Names, Numbered

logger = logging.getLogger("byolx")

_EXPECTED = (
  "a folder that TensorFlow Datasets prepared with file_format='array_record', with"
  " dataset_info.json and features.json in it"
)
_FILE_NAMES = ("file_name", "filename", "image/filename")
_READERS, _AT_ONCE = 4, 64  # files, and records per file, in one read of the labels
_PROGRESS_SECONDS = 10


@dataclass(frozen=True, eq=False)
class TFDSSource:
  """Data source of the records in a set of TensorFlow Datasets; the function `tfds` opens it.

  Attributes:
    name: name of the data set.
    files: paths of the ArrayRecord files.
    ends: for each file, the number of records in this file and all files before it together.
    image_key: key of the image in a record; each record is a tf.Example message.
    labels: class of each record, -1 if it is unlabelled.
    classes: names of the classes, empty for an unlabelled set.
    names: name of each record.
  """

  name: str
  files: tuple[str, ...]
  ends: Int64[np.ndarray, "f"]
  image_key: str
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]
  names: Sequence[str]
  _readers: Readers = field(default_factory=Readers, init=False, repr=False)

  def __len__(self) -> int:
    return len(self.labels)

  def encoded(self, index: int) -> tuple[bytes, str]:
    """Returns the bytes of one image file, and the name of the record.

    Raises:
      DecodeError: the record cannot be read or has no image.
    """
    index = range(len(self))[index]
    shard = int(np.searchsorted(self.ends, index, side="right"))
    start = int(self.ends[shard - 1]) if shard else 0
    name, path = self.names[index], self.files[shard]
    try:
      reader = self._readers.get(path, int(self.ends[shard]) - start)
      features = tf_example.features(read_record(reader, index - start))
      return tf_example.first_bytes(features, self.image_key), name
    except ValueError as error:
      raise DecodeError(f"{name}: record {index - start} of {path}: {error}") from error

  def __getitem__(self, index: int) -> Example:
    data, name = self.encoded(index)
    return Example(decode(data, name), int(self.labels[index]), name)


def tfds(folder: str | Path, split: str) -> TFDSSource:
  """Opens one split of a set that TensorFlow Datasets wrote, with one image and one class per record.

  The class may be missing. All records are read once for their labels; if this takes more than ten
  seconds, the progress is logged.

  Args:
    folder: path of one version of a set, such as `imagenet2012/5.1.0`; the field data.folder.
    split: name of the split: 'train', or 'test' for the set's `test`. If `test` is missing or unlabelled
      (as in ImageNet), the set's `validation` is the test split.

  Raises:
    ValueError: the split is unknown; the folder is not a set of TensorFlow Datasets in the format
      ArrayRecord; a file is missing or incomplete; the records have no image; they have several
      images, and none is the input for supervised learning.
  """
  check_split(split)
  root = Path(folder)
  info, features = _read_json(root, "dataset_info.json"), _read_json(root, "features.json")
  if not isinstance(info.get("name"), str):
    raise ValueError(f"{root / 'dataset_info.json'} has no name; expected {_EXPECTED}")
  keys = _keys(root, info, features)
  shards = _shards(root, info)
  choices = ("train",) if split == "train" else ("test", "validation")
  names = [name for name in choices if name in shards]
  if not names:
    raise ValueError(
      f"data.folder is {str(folder)!r}, which has the splits {', '.join(shards) or 'none'};"
      f" expected {' or '.join(choices)} for the {split} split"
    )
  name = names[0]
  if len(names) > 1 and keys.label and _labels_and_names(shards[name][0], keys, 1)[0][0] < 0:
    name = names[1]
  return _source(info["name"], name, shards[name], keys)


# 1. Metadata of a set.


class _Keys(NamedTuple):
  """Keys of the image, label and file name in the records of a set, and the class names.

  Attributes:
    image: key of the image.
    label: key of the class; '' if records have none.
    file_name: key of the file name; '' if records have none.
    classes: names of the classes, empty for an unlabelled set.
  """

  image: str
  label: str
  file_name: str
  classes: tuple[str, ...]


class _Shard(NamedTuple):
  """Path of one ArrayRecord file of a split, and the number of records that it should have."""

  path: Path
  records: int


def _read_json(root: Path, file: str) -> dict:
  try:
    content = json.loads((root / file).read_bytes())
  except OSError:
    inner = sorted(root.glob("*/dataset_info.json")) + sorted(root.glob("*/*/dataset_info.json"))
    hint = f"; did you mean {inner[0].parent}?" if inner else ""
    raise ValueError(
      f"data.folder is {str(root)!r}, which has no {file}; expected {_EXPECTED}{hint}"
    ) from None
  except ValueError as error:
    raise ValueError(f"{root / file} is damaged ({error}); expected {_EXPECTED}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{root / file} holds a {type(content).__name__}; expected {_EXPECTED}")
  return content


def _keys(root: Path, info: dict, features: dict) -> _Keys:
  """Finds the keys of the image, label and file name of a record, and the class names.

  Args:
    root: path of the set's folder.
    info: contents of `dataset_info.json`.
    features: contents of `features.json`.

  Raises:
    ValueError: records have no image; they have several images, and none is the input for supervised
      learning; or the number of class names is not the number of classes.
  """
  parts = features.get("featuresDict", {}).get("features", {})
  kinds = {key: part.get("pythonClassName", "").rpartition(".")[2] for key, part in parts.items()}
  images = [key for key, kind in kinds.items() if kind == "Image"]
  labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
  # Of several images or labels, those of as_supervised are used.
  items = info.get("supervisedKeys", {}).get("tuple", {}).get("items", [])
  supervised = [item.get("featureKey") for item in items]
  if len(images) > 1:
    images = [key for key in images if key in supervised[:1]]
  if len(labels) > 1:
    labels = [key for key in labels if key in supervised[1:2]]
  if len(images) != 1:
    present = ", ".join(f"{key} ({kind})" for key, kind in kinds.items()) or "nothing"
    raise ValueError(f"{root / 'features.json'} has {present}; expected one Image in a record")
  label = labels[0] if labels else ""
  classes = ()
  if label:
    file = root / f"{label}.labels.txt"
    count = int(parts[label].get("classLabel", {}).get("numClasses", 0))
    classes = tuple(str(number) for number in range(count))
    if file.is_file():
      classes = tuple(file.read_text(encoding="utf-8").splitlines())
    if not classes or len(classes) != count:
      raise ValueError(f"{root} has {count} classes and {len(classes)} names; expected one each")
  file_name = next((key for key in _FILE_NAMES if kinds.get(key) == "Text"), "")
  return _Keys(images[0], label, file_name, classes)


def _shards(root: Path, info: dict) -> dict[str, list[_Shard]]:
  """Returns the files of each split that has records, by the split's name.

  The files may be missing: their existence is not checked.

  Args:
    root: path of the set's folder.
    info: contents of `dataset_info.json`.

  Raises:
    ValueError: the set is not in the format ArrayRecord.
  """
  kind = info.get("fileFormat", "tfrecord")
  if kind != "array_record":
    raise ValueError(
      f"data.folder is {str(root)!r}, which is prepared as {kind}; expected {_EXPECTED} (prepare it"
      ' again, with TFDS from pip install "byolx[tfds]")'
    )
  shards = {}
  for split in info.get("splits", []):
    name, lengths = split["name"], [int(length) for length in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    if sum(lengths):
      fill = functools.partial(_file_name, template, info["name"], name, count=len(lengths))
      shards[name] = [_Shard(root / fill(i), length) for i, length in enumerate(lengths)]
  return shards


def _file_name(template: str, dataset: str, split: str, shard: int, count: int) -> str:
  """Fills in a template of TensorFlow Datasets, and returns the name of one file of a split.

  An example is `mnist-train.array_record-00000-of-00001`.
  """
  values = {
    "DATASET": dataset,
    "SPLIT": split,
    "FILEFORMAT": "array_record",
    "SHARD_INDEX": f"{shard:05d}",
    "NUM_SHARDS": f"{count:05d}",
    "SHARD_X_OF_Y": f"{shard:05d}-of-{count:05d}",
  }
  return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


# 2. Labels and names: one pass over all records.


def _source(dataset: str, split: str, shards: list[_Shard], keys: _Keys) -> TFDSSource:
  parts, start, reported = [], time.monotonic(), 0.0
  done, records = 0, sum(shard.records for shard in shards)
  with ThreadPoolExecutor(_READERS) as pool:
    for shard, part in zip(
      shards, pool.map(lambda s: _labels_and_names(s, keys, s.records), shards)
    ):
      parts.append(part)
      done += shard.records
      seconds = time.monotonic() - start
      if seconds > reported + _PROGRESS_SECONDS:
        reported = seconds
        logger.info("%s: labels of %d of the %d %s records read", dataset, done, records, split)
  labels = np.concatenate([labels for labels, _ in parts])
  names: Sequence[str] = Numbered(f"{dataset}/{split}", records)
  if keys.file_name:
    names = Names.joined([names for _, names in parts])
  if len(labels) and labels.max() >= max(len(keys.classes), 1):
    raise ValueError(
      f"{dataset}: a {split} label is {labels.max()}; expected classes 0 to {len(keys.classes) - 1}"
    )
  logger.info(
    "%s: %d images, %d classes in %s; labels read in %.0f s",
    dataset, records, len(keys.classes), split, time.monotonic() - start,
  )  # fmt: skip
  files = tuple(str(shard.path) for shard in shards)
  ends = np.cumsum([shard.records for shard in shards])
  return TFDSSource(dataset, files, ends, keys.image, labels, keys.classes, names)


def _labels_and_names(shard: _Shard, keys: _Keys, count: int) -> tuple[np.ndarray, Names]:
  """Reads the labels and names of the first `count` records of a file.

  Returns:
    The labels (int32), and the names. A label is -1 if it is missing or cannot be read.

  Raises:
    ValueError: the file does not exist, or has another number of records than `shard.records`.
  """
  if not shard.path.is_file():
    raise ValueError(f"{shard.path} does not exist; expected {shard.records} records in it")
  reader = ArrayRecordReader(str(shard.path))  # with read-ahead, unlike the readers of training
  if reader.num_records() != shard.records:
    raise ValueError(
      f"{shard.path} has {reader.num_records()} records; expected {shard.records}, as in"
      " dataset_info.json"
    )
  labels, names = np.full(count, -1, np.int32), []
  for number, record in enumerate(_records(reader, count)):
    name = f"{shard.path.name}/{number}"
    try:
      features = tf_example.features(record)
      if keys.label:
        labels[number] = tf_example.first_int(features, keys.label)
      if keys.file_name:
        name = tf_example.first_bytes(features, keys.file_name).decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError) as error:
      logger.debug("%s: %s", name, error)  # training logs it when it reads the image
    names.append(name)
  reader.close()
  return labels, Names.of(names)


def _records(reader: ArrayRecordReader, count: int) -> Iterator[bytes]:
  """Yields the first `count` records of a file. For a damaged record it yields b"" instead."""
  for start in range(0, count, _AT_ONCE):
    numbers = list(range(start, min(start + _AT_ONCE, count)))
    try:
      yield from reader.read(numbers)
    except RuntimeError:
      for number in numbers:
        try:
          yield from reader.read([number])
        except RuntimeError:
          yield b""
