"""Reads and writes the metadata of a prepared set: `dataset.json`, and the index file of each split.

A prepared set is a data set that `byolx prepare` converted to a few large files.

The files may be damaged or malicious: file names must stay inside the folder, nothing is unpickled, and
an inconsistent value raises an error that names the file.
"""

import hashlib
import io
import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt32

from byolx.data.sources.base import check_split
from byolx.data.sources.names import Names

FORMAT = 1
MANIFEST = "dataset.json"
PROGRESS = ".prepare"
"""Name of the subfolder of a set in which an unfinished `byolx prepare` keeps its state."""


# 1. dataset.json.


@dataclass(frozen=True)
class Shard:
  """Entry of `dataset.json` for a shard, one of the large files of a prepared data set.

  Attributes:
    file: name of the file in the folder of the set.
    records: number of records in the file.
    bytes: size of the file in bytes.
    sha256: SHA-256 of the file, in hexadecimal.
  """

  file: str
  records: int
  bytes: int
  sha256: str


@dataclass(frozen=True)
class IndexFile:
  """Entry of `dataset.json` for the index of a split: the file of its labels, checksums and names.

  Attributes:
    file: name of the file in the folder of the set.
    bytes: size of the file in bytes.
    sha256: SHA-256 of the file, in hexadecimal.
  """

  file: str
  bytes: int
  sha256: str


@dataclass(frozen=True)
class StoredSplit:
  """Entry of `dataset.json` for a split: its files and their number of records.

  Attributes:
    records: number of records of the split.
    index: file of the labels, checksums and names of the records.
    shards: files of the records, in order.
  """

  records: int
  index: IndexFile
  shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
  """Contents of `dataset.json`, the file that describes a data set written by `byolx prepare`.

  Attributes:
    name: name of the data set.
    byolx: version of byolx that wrote the set.
    encode: settings with which large images were reduced; None if all files were stored unchanged.
    classes: names of the classes, empty for an unlabelled set.
    splits: files of each split by its name: 'train', and 'test' if a test split was prepared.
  """

  name: str
  byolx: str
  encode: dict[str, Any] | None
  classes: tuple[str, ...]
  splits: dict[str, StoredSplit]

  def to_json(self) -> str:
    return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
  """Reads and checks `dataset.json`, the file that describes a data set written by `byolx prepare`.

  Raises:
    ValueError: the file is missing, damaged or of another format, or the set is unfinished.
  """
  path = Path(folder) / MANIFEST
  if not path.is_file():
    if (Path(folder) / PROGRESS).is_dir():
      raise ValueError(
        f"{folder} is an unfinished set, without {MANIFEST}; run the same `byolx prepare` command"
        " again to finish it"
      )
    raise ValueError(f"{folder} has no {MANIFEST}; expected a folder written by `byolx prepare`")
  try:
    values = json.loads(path.read_text())
    version = values.pop("format")
    if version == FORMAT:
      return _manifest(**values)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{path} is damaged: {error}; expected a file of `byolx prepare`") from error
  raise ValueError(
    f"{path} has the format {version!r}; expected {FORMAT}, which this version reads"
  )


def _manifest(name, byolx, encode, classes, splits) -> Manifest:
  """Makes a `Manifest` from the fields of `dataset.json`, and checks them.

  Raises:
    TypeError, KeyError, AttributeError: a field is missing or unknown, or has another type.
    ValueError: the fields are inconsistent, or a file is not in the folder of the set.
  """
  stored = {}
  for split, entry in splits.items():
    check_split(split)
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    stored[split] = StoredSplit(entry["records"], IndexFile(**entry["index"]), shards)
    for file in (stored[split].index, *shards):
      if os.path.basename(file.file) != file.file:
        raise ValueError(f"the file {file.file!r} is not in the set's folder")
    if stored[split].records != sum(shard.records for shard in shards):
      raise ValueError(f"the shards of {split} do not have {stored[split].records} records")
  if not stored:
    raise ValueError("the set has no split")
  return Manifest(name, byolx, encode, tuple(classes), stored)


# 2. The index.


class Index(NamedTuple):
  """Labels, checksums and names of the records (images) in one split of a prepared data set.

  Attributes:
    labels: class of each record, -1 if it is unlabelled.
    crc32: CRC-32 of the bytes of each record.
    names: name of each record.
  """

  labels: Int32[np.ndarray, "n"]
  crc32: UInt32[np.ndarray, "n"]
  names: Names

  def to_bytes(self) -> bytes:
    """Returns the bytes of an `.npz` file with this index; equal indices give equal bytes."""
    file = io.BytesIO()
    key_bytes = np.frombuffer(self.names.buffer, np.uint8)
    np.savez(
      file, labels=self.labels, crc32=self.crc32, key_bytes=key_bytes, key_ends=self.names.ends
    )
    return file.getvalue()


def read_index(folder: str | Path, stored: StoredSplit, classes: int) -> Index:
  """Reads and checks the index of a split: the labels, checksums and names of its records.

  Args:
    folder: path of the prepared set.
    stored: entry of the split in `dataset.json`.
    classes: number of classes; labels must be -1 to classes - 1.

  Raises:
    ValueError: the file is missing or damaged.
  """
  path = Path(folder) / stored.index.file
  check_size(path, stored.index.bytes)
  data = path.read_bytes()
  if hashlib.sha256(data).hexdigest() != stored.index.sha256:
    raise ValueError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
  kinds = {"labels": np.int32, "crc32": np.uint32, "key_bytes": np.uint8, "key_ends": np.int64}
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      labels, crc32, key_bytes, ends = (arrays[name] for name in kinds)
  except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is not an index: {error}; expected {', '.join(kinds)}") from error
  formats = [(array.dtype, array.shape) for array in (labels, crc32, key_bytes, ends)]
  lengths = (stored.records, stored.records, key_bytes.size, stored.records)
  expected = [(np.dtype(kind), (length,)) for kind, length in zip(kinds.values(), lengths)]
  limits = np.concatenate([[0], ends.ravel(), [key_bytes.size]])
  in_order = limits[-1] == limits[-2] and (np.diff(limits) >= 0).all()
  if formats != expected or not in_order or ((labels < -1) | (labels >= classes)).any():
    raise ValueError(
      f"{path} is not an index of {stored.records} records of {classes} classes; expected the file"
      " that `byolx prepare` wrote"
    )
  return Index(labels, crc32, Names(key_bytes.tobytes(), ends))


def check_size(path: Path, expected: int) -> None:
  """Checks that a file has the expected size in bytes.

  Raises:
    ValueError: the file is missing or has another size.
  """
  try:
    size = path.stat().st_size
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}; expected a file of {expected} bytes") from error
  if size != expected:
    raise ValueError(f"{path} has {size} bytes; expected {expected}, as in {MANIFEST}")


def sha256_of(path: str | Path) -> str:
  """Computes the SHA-256 of the contents of a file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
