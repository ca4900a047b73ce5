"""The files of a prepared set beside its shards: `dataset.json` and the index of every split.

Both are read as what a stranger may have written: names of files stay inside the folder, nothing
is unpickled, and what does not fit together is an error that names the file.
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
"""The folder, inside a set, of what `byolx prepare` knows about its own progress."""


# 1. What dataset.json says.


@dataclass(frozen=True)
class Shard:
  """One file of records."""

  file: str
  records: int
  bytes: int
  sha256: str


@dataclass(frozen=True)
class IndexFile:
  """The file with labels, checksums and names of a split's records."""

  file: str
  bytes: int
  sha256: str


@dataclass(frozen=True)
class StoredSplit:
  """The files of a split."""

  records: int
  index: IndexFile
  shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
  """The contents of `dataset.json`.

  Attributes:
    name: of the data set.
    byolx: the version that wrote it.
    encode: how images were made smaller; None if every file is as it was.
    classes: names of the classes, empty if there are none.
    splits: 'train', and 'test' if the set has a test split of its own.
  """

  name: str
  byolx: str
  encode: dict[str, Any] | None
  classes: tuple[str, ...]
  splits: dict[str, StoredSplit]

  def to_json(self) -> str:
    return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
  """Reads `dataset.json`.

  Raises:
    ValueError: no prepared set, an unfinished one, one of a newer format, or damage.
  """
  path = Path(folder) / MANIFEST
  if not path.is_file():
    if (Path(folder) / PROGRESS).is_dir():
      raise ValueError(
        f"{folder} is an unfinished set, without {MANIFEST}; expected that the `byolx prepare` that"
        " began it is run again, and goes on where it stopped"
      )
    raise ValueError(f"{folder} has no {MANIFEST}; expected a folder written by `byolx prepare`")
  try:
    values = json.loads(path.read_text())
    found = values.pop("format")
    if found == FORMAT:
      return _manifest(**values)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{path} is damaged: {error}; expected what `byolx prepare` wrote") from error
  raise ValueError(f"{path} has the format {found!r}; expected {FORMAT}, which this version reads")


def _manifest(name, byolx, encode, classes, splits) -> Manifest:
  """Checks what the rest relies on; a wrong or missing field is a TypeError of the call itself."""
  stored = {}
  for split, of_split in splits.items():
    check_split(split)
    shards = tuple(Shard(**shard) for shard in of_split["shards"])
    stored[split] = StoredSplit(of_split["records"], IndexFile(**of_split["index"]), shards)
    for file in (stored[split].index, *shards):
      if os.path.basename(file.file) != file.file:
        raise ValueError(f"the file {file.file!r} is not in the set's folder")
    if stored[split].records != sum(shard.records for shard in shards):
      raise ValueError(f"the shards of {split} do not have {stored[split].records} records")
  if not stored:
    raise ValueError("it has no split")
  return Manifest(name, byolx, encode, tuple(classes), stored)


# 2. The index.


class Index(NamedTuple):
  """Of every record of a split: its class (-1 for none), the checksum of its bytes, its name."""

  labels: Int32[np.ndarray, "n"]
  crc32: UInt32[np.ndarray, "n"]
  names: Names

  def to_bytes(self) -> bytes:
    """An `.npz` file, the same bytes for the same index."""
    file = io.BytesIO()
    key_bytes = np.frombuffer(self.names.buffer, np.uint8)
    np.savez(
      file, labels=self.labels, crc32=self.crc32, key_bytes=key_bytes, key_ends=self.names.ends
    )
    return file.getvalue()


def read_index(folder: str | Path, stored: StoredSplit, classes: int) -> Index:
  """Reads the index of a split whose records are of so many classes.

  Raises:
    ValueError: the file is missing, or not the one that was written.
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
    raise ValueError(f"{path} is no index: {error}; expected {', '.join(kinds)}") from error
  found = [(array.dtype, array.shape) for array in (labels, crc32, key_bytes, ends)]
  lengths = (stored.records, stored.records, key_bytes.size, stored.records)
  expected = [(np.dtype(kind), (length,)) for kind, length in zip(kinds.values(), lengths)]
  limits = np.concatenate([[0], ends.ravel(), [key_bytes.size]])
  in_order = limits[-1] == limits[-2] and (np.diff(limits) >= 0).all()
  if found != expected or not in_order or ((labels < -1) | (labels >= classes)).any():
    raise ValueError(
      f"{path} is no index of {stored.records} records of {classes} classes; expected the one that"
      " `byolx prepare` wrote"
    )
  return Index(labels, crc32, Names(key_bytes.tobytes(), ends))


def check_size(path: Path, expected: int) -> None:
  """Raises ValueError unless there is a file of so many bytes."""
  try:
    found = path.stat().st_size
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}; expected a file of {expected} bytes") from error
  if found != expected:
    raise ValueError(f"{path} has {found} bytes; expected {expected}, as in {MANIFEST}")


def sha256_of(path: str | Path) -> str:
  """The digest of a file's bytes, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
