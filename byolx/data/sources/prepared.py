"""Reads and verifies prepared sets: the images of a data set in a few large files with random access.

Millions of small files are slow to list and slow to open. `byolx prepare` copies their contents to a
folder of these files:

  dataset.json                         manifest: splits, classes, sizes and checksums of the files;
                                       written last, so a set without it is unfinished
  train-00000-of-00016.array_record    shard in the format ArrayRecord; a record is the bytes of one
                                       image file
  train.index.npz                      label, checksum and name of each record
  unreadable.txt                       images that were left out, with the reasons

The function `prepared` opens this folder for training. It checks the SHA-256 of the index and the sizes
of the shards. The CRC-32 of a record is checked when the record is read. The checksums inside the
ArrayRecord files do not suffice: if a shard is truncated while it is open, reads return empty records
without an error. The function `verify` checks a whole set.
"""

import bisect
import itertools
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32, UInt32

from byolx.data.decode import DecodeError, decode
from byolx.data.sources.array_record import Readers, open_shard, read_record
from byolx.data.sources.base import SPLIT_SEED, EncodedSource, Example, check_split, subset
from byolx.data.sources.names import Names
from byolx.data.sources.prepared_format import (
  MANIFEST,
  Index,
  Manifest,
  Shard,
  check_size,
  read_index,
  read_manifest,
  sha256_of,
)
from byolx.data.sources.retry import with_retries
from byolx.data.splits import stratified_holdout

# 1. Reading records.


@dataclass(frozen=True, eq=False)
class RecordSource:
  """Data source of the records in one split of a prepared set, which `byolx prepare` wrote.

  A shard (one file of records) is opened at the first read from it.

  Attributes:
    name: name of the data set.
    folder: path of the prepared set.
    shards: shards of the split, in the order of their records.
    labels: class of each record, -1 if it is unlabelled.
    classes: names of the classes, empty for an unlabelled set.
    names: name of each record.
    crc32: CRC-32 checksum of the bytes of each record.
  """

  name: str
  folder: str
  shards: tuple[Shard, ...]
  labels: Int32[np.ndarray, "n"]
  classes: tuple[str, ...]
  names: Names
  crc32: UInt32[np.ndarray, "n"]
  _readers: Readers = field(default_factory=Readers, init=False, repr=False)

  def __len__(self) -> int:
    return len(self.labels)

  def encoded(self, index: int) -> tuple[bytes, str]:
    """Returns the bytes of one image file, and the name of the record.

    Raises:
      DecodeError: the shard cannot be read, or the bytes do not match their checksum.
      FolderLostError: the folder is missing, and did not come back while the read was retried.
    """
    index = range(len(self))[index]
    number = bisect.bisect_right(self._ends, index)
    shard, key = self.shards[number], self.names[index]
    position = index - (self._ends[number] - shard.records)
    path = os.path.join(self.folder, shard.file)

    def read() -> bytes:
      return _checked(self._readers.get(path, shard.records), position, int(self.crc32[index]))

    try:
      return with_retries(read, self.folder), key
    except DecodeError as error:
      raise DecodeError(f"{key}: record {position} of {path}: {error}") from None

  def __getitem__(self, index: int) -> Example:
    data, key = self.encoded(index)
    return Example(decode(data, key), int(self.labels[index]), key)

  @cached_property
  def _ends(self) -> list[int]:
    return list(itertools.accumulate(shard.records for shard in self.shards))


def _checked(reader: ArrayRecordReader, position: int, crc32: int) -> bytes:
  data = read_record(reader, position)
  if zlib.crc32(data) != crc32:
    raise DecodeError("the shard is damaged: these are not the bytes that were prepared (crc32)")
  return data


def prepared(folder: str | Path, split: str, test_share: float = 0.2) -> EncodedSource:
  """Opens one split of a set written by `byolx prepare`.

  If the set has only a training split, `test_share` of each class is held out as the test split. These
  records are chosen by a hash of their names. The test split is then the same as that of the original
  image folder, unless images were left out.

  Args:
    folder: path of the prepared set; the field data.folder.
    split: name of the split, 'train' or 'test'.
    test_share: share of each class in the test split, 0 <= share < 1.

  Raises:
    ValueError: the split is unknown or has no record; the folder has no prepared set, an unfinished one
      or one of another format; an index is missing or damaged; a shard is missing or has another size
      than in `dataset.json`.
  """
  check_split(split)
  manifest = read_manifest(folder)
  if len(manifest.splits) > 1:
    source = _open_split(folder, manifest, split)
  else:
    (only,) = manifest.splits
    source = _open_split(folder, manifest, only)
    train, test = stratified_holdout(source.labels, test_share, SPLIT_SEED, source.names)
    source = subset(source, train if split == "train" else test)
  if not len(source):
    raise ValueError(
      f"{folder} has no record in the {split} split (data.test_share {test_share}); expected some"
    )
  return source


def _open_split(folder: str | Path, manifest: Manifest, split: str) -> RecordSource:
  stored = manifest.splits[split]
  for shard in stored.shards:
    check_size(Path(folder) / shard.file, shard.bytes)
  index = read_index(folder, stored, len(manifest.classes))
  return RecordSource(
    manifest.name,
    str(folder),
    stored.shards,
    index.labels,
    manifest.classes,
    index.names,
    index.crc32,
  )


# 2. Verifying.


def verify(
  folder: str | Path,
  report: Callable[[int, int], None] = lambda records, size: None,
  *,
  images: bool = False,
  threads: int = 1,
) -> list[str]:
  """Checks all files and records of a prepared data set against their checksums.

  Args:
    folder: path of the prepared set.
    report: function that is called after each shard (one file of records) with the number of records
      and bytes of the shard.
    images: whether to decode the image in each record as well.
    threads: number of shards read in parallel.

  Returns:
    Descriptions of the problems, one line for each, in the order of splits, shards and records; an
    empty list for a set without damage.

  Raises:
    ValueError: the manifest `dataset.json` is missing or damaged, or the set is unfinished.
  """
  manifest = read_manifest(folder)
  problems = []
  for stored in manifest.splits.values():
    try:
      index = read_index(folder, stored, len(manifest.classes))
    except ValueError as error:
      problems.append(str(error))
      index = None
    starts = itertools.accumulate((shard.records for shard in stored.shards), initial=0)
    parts = [slice(start, start + shard.records) for start, shard in zip(starts, stored.shards)]

    def check(shard: Shard, part: slice, index=index) -> list[str]:
      shard_problems = _verify_shard(Path(folder) / shard.file, shard, index, part, images)
      report(shard.records, shard.bytes)
      return shard_problems

    with ThreadPoolExecutor(threads) as pool:
      for shard_problems in pool.map(check, stored.shards, parts):
        problems += shard_problems
  return problems


def _verify_shard(
  path: Path, shard: Shard, index: Index | None, part: slice, images: bool
) -> list[str]:
  """Checks one shard (large file) of a prepared data set. Returns its problems, one line for each.

  Args:
    path: path of the file.
    shard: entry of the shard in the manifest.
    index: index of the split. It is None if it cannot be read; then the records are not checked.
    part: positions of the shard's records in the index.
    images: whether to decode the image in each record as well.
  """
  try:
    check_size(path, shard.bytes)
    sha256 = sha256_of(path)
  except (ValueError, OSError) as error:
    return [str(error)]
  problems = []
  if sha256 != shard.sha256:
    problems.append(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
  elif index is None:
    return []
  try:
    reader = open_shard(str(path), shard.records)
  except DecodeError as error:
    return [*problems, f"{path}: {error}"]
  if index is not None:
    checksums, names = index.crc32[part].tolist(), index.names[part]
    problems += _verify_records(path, reader, checksums, names, images)
  return problems


def _verify_records(
  path: Path,
  reader: ArrayRecordReader,
  checksums: Sequence[int],
  names: Sequence[str],
  images: bool,
) -> list[str]:
  problems = []
  for position, (crc32, key) in enumerate(zip(checksums, names)):
    try:
      data = _checked(reader, position, crc32)
    except DecodeError as error:
      problems.append(f"{key}: record {position} of {path}: {error}")
      continue
    try:
      if images:
        decode(data, key)
    except DecodeError as error:
      problems.append(f"{error} (record {position} of {path})")
  return problems
