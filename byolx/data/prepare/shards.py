"""Atomic writing of one shard of a prepared set by one process.

A shard is written to a temporary file in the folder `prepared_format.PROGRESS`, flushed to disk and
renamed; then a progress file with its contents is written in the same way. So a process may be
killed at any time: a file with its final name is complete, and a shard with an intact progress file
is not written again.
"""

import contextlib
import io
import json
import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from PIL import Image

from byolx.core.machine import end_with_parent
from byolx.data.decode import DecodeError, decode
from byolx.data.prepare.collect import Inputs
from byolx.data.sources.prepared_format import PROGRESS, Shard, sha256_of

OPTIONS = "group_size:1,uncompressed"
"""Groups of one record, for random access; no compression, since JPEGs hardly compress further."""

TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Encode:
  """Settings of the resize: images with a longer shorter side are reduced and stored as JPEG.

  Attributes:
    short_side: largest shorter side in pixels.
    quality: JPEG quality, 1 to 100.
    subsampling: chroma subsampling of the JPEG; 4:2:0 stores the colours at half the resolution.
  """

  short_side: int
  quality: int = 95
  subsampling: str = "4:2:0"

  def describe(self) -> dict[str, Any]:
    """Returns the entry of `dataset.json`."""
    return {**asdict(self), "resize": "bicubic, antialiased", "format": "jpeg"}

  def apply(self, image: UInt8[np.ndarray, "h w 3"], data: bytes, name: str) -> bytes:
    """Returns the bytes to store: `data` itself, or a smaller JPEG if the image is too large.

    Args:
      image: decoded image.
      data: bytes of its file.
      name: name of the file in messages.

    Raises:
      DecodeError: the smaller image exceeds the sides of a JPEG, 65,500 pixels.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short <= self.short_side:
      return data
    size = self.short_side * width // short, self.short_side * height // short
    file = io.BytesIO()
    try:
      smaller = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
      smaller.save(file, "JPEG", quality=self.quality, subsampling=self.subsampling)
    except (OSError, ValueError) as error:
      raise DecodeError(f"{name}: no JPEG of {size[0]} x {size[1]} pixels: {error}") from error
    return file.getvalue()


@dataclass(frozen=True)
class Job:
  """A shard to write.

  Attributes:
    folder: path of the set.
    file: file name of the shard.
    inputs: images of the shard.
    encode: settings of the resize; None to store each file unchanged.
  """

  folder: str
  file: str
  inputs: Inputs
  encode: Encode | None


@dataclass(frozen=True)
class Finished:
  """A written shard.

  Attributes:
    shard: entry of `dataset.json`.
    kept: indices of the job's inputs in the shard.
    crc32: CRC-32 of the bytes of each record.
    unreadable: one line `name: reason` per input that was left out.
  """

  shard: Shard
  kept: list[int]
  crc32: list[int]
  unreadable: list[str]


def start_worker() -> None:
  """Initialises a worker process: one thread for OpenCV, and exit when the parent exits."""
  cv2.setNumThreads(0)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # only the parent reports Ctrl-C
  end_with_parent()


def write_shard(job: Job) -> Finished:
  """Writes a shard, unless it exists already and matches its checksum.

  Raises:
    OSError: the shard cannot be written, for example on a full disk; no partial file is left.
  """
  path = Path(job.folder) / job.file
  progress_file = Path(job.folder) / PROGRESS / f"{job.file}.json"
  earlier = _read_progress(progress_file)
  if earlier is not None and path.is_file() and sha256_of(path) == earlier.shard.sha256:
    return earlier
  kept, crc32, unreadable = [], [], []
  with _temporary(path) as temporary:
    with _writer(temporary) as writer:
      for index in range(len(job.inputs)):
        try:
          data, name = job.inputs.read(index)
          image = decode(data, name)  # needed without `encode` too: damaged files are left out
          data = job.encode.apply(image, data, name) if job.encode else data
        except DecodeError as error:
          unreadable.append(str(error))
          continue
        writer.write(data)
        kept.append(index)
        crc32.append(zlib.crc32(data))
    size, sha256 = temporary.stat().st_size, sha256_of(temporary)
  finished = Finished(Shard(job.file, len(kept), size, sha256), kept, crc32, unreadable)
  write_durably(progress_file, json.dumps(asdict(finished)).encode())
  return finished


def write_durably(path: Path, data: bytes) -> None:
  """Replaces a file atomically and flushes it to disk; after an error the old file remains."""
  with _temporary(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
  """Yields a temporary path, which is renamed to `path` at the end or deleted after an error."""
  folder = path.parent if path.parent.name == PROGRESS else path.parent / PROGRESS
  temporary = folder / f"{path.name}.{os.getpid()}{TEMPORARY}"
  try:
    yield temporary
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
  """Flushes a file, or the entries of a folder, to disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
  """Yields a writer of records; its errors, also those on closing, become OSErrors."""
  writer = ArrayRecordWriter(str(path), OPTIONS)
  try:
    yield writer
    writer.close()
  except RuntimeError as error:
    reason = str(error).partition("; writing")[0].partition("failed: ")
    raise OSError(f"{path.name.partition('.array_record')[0]}: {reason[2] or error}") from error
  finally:
    if writer.is_open():
      with contextlib.suppress(RuntimeError):
        writer.close()


def _read_progress(path: Path) -> Finished | None:
  """Reads a progress file of an earlier process; None if it is missing or damaged."""
  try:
    values = json.loads(path.read_text())
    return Finished(Shard(**values["shard"]), values["kept"], values["crc32"], values["unreadable"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
