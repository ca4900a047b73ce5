"""Writes one shard of a prepared set atomically.

A prepared set is a data set of images in a few large files, which are called shards.

A shard is written to a temporary file in the folder `prepared_format.PROGRESS`, flushed to disk and
renamed. Then a progress file, which describes the shard, is written in the same way. So the process may
be killed at any time. A file with its final name is complete, and a shard with an intact progress file
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
"""Options of ArrayRecord: single records for random access; uncompressed, as JPEGs hardly shrink more."""

TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Encode:
  """Settings for making large images smaller. The smaller images are stored as JPEG.

  An image is reduced if its shorter side is longer than `short_side`. Its shorter side then has this
  length.

  Attributes:
    short_side: largest length of the shorter side in pixels.
    quality: JPEG quality, 1 to 100.
    subsampling: chroma subsampling of the JPEG; 4:2:0 stores the colours at half the resolution.
  """

  short_side: int
  quality: int = 95
  subsampling: str = "4:2:0"

  def describe(self) -> dict[str, Any]:
    """Returns these settings as a dict, as they are stored in `dataset.json`."""
    return {**asdict(self), "resize": "bicubic, antialiased", "format": "jpeg"}

  def apply(self, image: UInt8[np.ndarray, "h w 3"], data: bytes, name: str) -> bytes:
    """Returns the bytes to store for an image: `data` itself, or a reduced JPEG of a large image.

    Args:
      image: decoded image.
      data: bytes of the image file.
      name: name of the file for messages.

    Raises:
      DecodeError: a side of the reduced image is longer than 65,500 pixels, the limit of JPEG.
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
  """Task to write one shard. A shard is one of the large files of a prepared data set.

  Attributes:
    folder: path of the prepared set.
    file: file name of the shard.
    inputs: image files to store in the shard.
    encode: settings for reducing large images; None to store each file unchanged.
  """

  folder: str
  file: str
  inputs: Inputs
  encode: Encode | None


@dataclass(frozen=True)
class Finished:
  """Description of a finished shard. A shard is one of the large files of a prepared data set.

  Attributes:
    shard: entry of the shard in `dataset.json`.
    kept: indices of the input images that are stored in the shard; the others were unreadable.
    crc32: CRC-32 of the bytes of each stored record.
    unreadable: one line `name: reason` for each input image that was left out.
  """

  shard: Shard
  kept: list[int]
  crc32: list[int]
  unreadable: list[str]


def start_worker() -> None:
  """Sets up a worker process: OpenCV uses one thread, and the process ends when its parent ends."""
  cv2.setNumThreads(0)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # only the parent reports Ctrl-C
  end_with_parent()


def write_shard(job: Job) -> Finished:
  """Writes a shard, one of the large files of a prepared data set.

  If an earlier run wrote the shard and it still matches its checksum, it is not written again. Images
  that cannot be read or decoded are left out.

  Returns:
    Description of the shard, also if an earlier run wrote it.

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
  """Writes `data` to the file `path` and flushes it to disk.

  An existing file is replaced atomically: it remains if the new one cannot be written.
  """
  with _temporary(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
  """Yields the path of a temporary file, for writing the file `path` atomically.

  At the end of the context, the temporary file is flushed to disk and renamed to `path`. After an error
  it is deleted instead.
  """
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
  """Flushes a file to disk. If `path` is a folder, the list of its files is flushed."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
  """Yields a writer for one ArrayRecord file, and closes the writer at the end.

  Raises:
    OSError: the file cannot be written or closed.
  """
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
  """Reads the progress file of a shard, and returns the description of the shard.

  Returns None if the progress file is missing or damaged.
  """
  try:
    values = json.loads(path.read_text())
    return Finished(Shard(**values["shard"]), values["kept"], values["crc32"], values["unreadable"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
