"""One shard of a prepared set, written by one process, whole or not at all.

A shard is written under another name in the folder `prepared_format.PROGRESS`, brought to the disk and
then renamed; after that a note of what is in it is written the same way. So a process may be killed
at any moment: what has its final name is whole, and a shard with its note is never written twice.
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
"""A record can be read without its neighbours, and JPEGs do not compress any further."""

TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Encode:
  """How images are made smaller: those whose shorter side is longer than `short_side`, as JPEG."""

  short_side: int
  quality: int = 95
  subsampling: str = "4:2:0"
  """Of the colours: half the resolution, as in nearly all photographs on the web."""

  def describe(self) -> dict[str, Any]:
    """For `dataset.json`."""
    return {**asdict(self), "resize": "bicubic, antialiased", "format": "jpeg"}

  def apply(self, image: UInt8[np.ndarray, "h w 3"], data: bytes, name: str) -> bytes:
    """The bytes to be stored for the file `data`, which shows `image`.

    Raises:
      DecodeError: the smaller image cannot be a JPEG file, whose sides end at 65,500 pixels.
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
  """A shard to be: where, and of which inputs."""

  folder: str
  file: str
  inputs: Inputs
  encode: Encode | None


@dataclass(frozen=True)
class Finished:
  """A shard that is on disk.

  Attributes:
    shard: for `dataset.json`.
    kept: which of the job's inputs are in it.
    crc32: of every record.
    unreadable: `name: reason` of the other inputs.
  """

  shard: Shard
  kept: list[int]
  crc32: list[int]
  unreadable: list[str]


def start_worker() -> None:
  """Prepares a process for `finish`: one core, and an end with the process that started it."""
  cv2.setNumThreads(0)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says that it was stopped
  end_with_parent()


def finish(job: Job) -> Finished:
  """Writes a shard, unless it is there already: then it is compared with its digest, and kept.

  Raises:
    OSError: it cannot be written, as where the disk is full; nothing of it is left.
  """
  path = Path(job.folder) / job.file
  note = Path(job.folder) / PROGRESS / f"{job.file}.json"
  found = _read_note(note)
  if found is not None and path.is_file() and sha256_of(path) == found.shard.sha256:
    return found
  kept, crc32, unreadable = [], [], []
  with _temporary(path) as temporary:
    with _writer(temporary) as writer:
      for index in range(len(job.inputs)):
        try:
          data, name = job.inputs.read(index)
          image = decode(data, name)  # also where it is stored as it is: what is broken is listed
          data = job.encode.apply(image, data, name) if job.encode else data
        except DecodeError as error:
          unreadable.append(str(error))
          continue
        writer.write(data)
        kept.append(index)
        crc32.append(zlib.crc32(data))
    size, digest = temporary.stat().st_size, sha256_of(temporary)
  finished = Finished(Shard(job.file, len(kept), size, digest), kept, crc32, unreadable)
  write_durably(note, json.dumps(asdict(finished)).encode())
  return finished


def write_durably(path: Path, data: bytes) -> None:
  """Writes a whole file to the disk, or leaves the old one."""
  with _temporary(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
  """A path to write to that becomes `path` at the end, or nothing if that is not reached."""
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
  """Waits until a file, or the list of files in a folder, is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
  """A writer of records; what it cannot write, now or on closing, is an OSError."""
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


def _read_note(path: Path) -> Finished | None:
  """What an earlier process noted; None if there is no note, or none that can be read."""
  try:
    values = json.loads(path.read_text())
    return Finished(Shard(**values["shard"]), values["kept"], values["crc32"], values["unreadable"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
