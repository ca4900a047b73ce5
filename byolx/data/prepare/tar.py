"""Tar archives as lists of images: where in the archive the bytes of each one lie.

Nothing is ever extracted, so a name in an archive never becomes a path on the disk. Names that
lead out of the archive, links and devices are not followed but listed with what is wrong with
them. A tar inside the archive is a folder of its name, which is how ImageNet's training images
come: a tar of `n01440764.tar` and 999 others.
"""

import io
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from byolx.data.decode import is_image_name

_COMPRESSED = {
  b"\x1f\x8b": "gzip",
  b"\xfd7zXZ\0": "xz",
  b"BZh": "bzip2",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"\x04\x22\x4d\x18": "lz4",
  b"PK\x03\x04": "zip",
}
_BLOCK = 512


@dataclass
class Archive:
  """What a tar holds.

  Attributes:
    images: by name, as `folder/file.jpg`: (offset, size) of the bytes in the archive.
    folders: every folder that the archive mentions, hidden ones left out.
    left_out: `member: reason`, a line for everything that was not taken though it might be meant.
    ignored: how many other files there are, by extension.
  """

  images: dict[str, tuple[int, int]] = field(default_factory=dict)
  folders: set[str] = field(default_factory=set)
  left_out: list[str] = field(default_factory=list)
  ignored: Counter = field(default_factory=Counter)


def list_archive(path: str | Path) -> Archive:
  """Lists an uncompressed tar. Of two members of one name the later one counts, as in unpacking.

  Raises:
    ValueError: compressed, no tar, or cut short.
    OSError: the file cannot be read.
  """
  archive = Archive()
  with open(path, "rb", buffering=0) as file:
    window = _Window(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    _list(window, str(path), "", archive)
  return archive


def read_member(path: str | Path, offset: int, size: int) -> bytes:
  """The bytes of one image.

  Raises:
    OSError: they cannot be read, or the archive is shorter than it was.
  """
  with open(path, "rb", buffering=0) as file:
    data = os.pread(file.fileno(), size, offset)
  if len(data) != size:
    raise OSError(f"the archive ends after {len(data)} of {size} bytes")
  return data


def one_line(text: str) -> str:
  """A name as it can stand in a line of a list."""
  return text.replace("\n", "\\n").replace("\r", "\\r")


class _Window(io.RawIOBase):
  """A part of an open file, as a file."""

  def __init__(self, descriptor: int, start: int, size: int):
    self.descriptor, self.start, self.size = descriptor, start, size
    self._position = 0

  def read(self, size: int = -1) -> bytes:
    left = max(0, self.size - self._position)
    size = left if size < 0 else min(size, left)
    data = os.pread(self.descriptor, size, self.start + self._position)
    self._position += len(data)
    return data

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
    self._position = base + offset
    return self._position

  def tell(self) -> int:
    return self._position

  def seekable(self) -> bool:
    return True

  def readable(self) -> bool:
    return True


def _list(window: _Window, path: str, folder: str, archive: Archive) -> None:
  """Adds the members of the tar in `window`, all of them below `folder`."""
  _refuse_compressed(window, path)
  try:
    with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # a million of them would fill the memory
        _add(member, window, path, folder, archive)
  except tarfile.TarError as error:
    raise ValueError(f"{path}: {error}; expected a whole, uncompressed tar archive") from error
  # tarfile takes a damaged header in the middle for the end.
  window.seek(tar.offset)
  if window.read(_BLOCK) != bytes(_BLOCK):
    raise ValueError(
      f"{path} is damaged or cut short at byte {window.start + tar.offset}; expected the next"
      " member or the end mark of a tar archive"
    )


def _add(
  member: tarfile.TarInfo, window: _Window, path: str, folder: str, archive: Archive
) -> None:
  parts = [part for part in member.name.split("/") if part not in ("", ".")]
  name = "/".join([folder, *parts] if folder else parts)
  if any(part.startswith(".") and part != ".." for part in parts):
    return
  if reason := _objection(member, parts):
    shown = f"{folder}.tar/{member.name}" if folder else member.name
    archive.left_out.append(f"{one_line(shown)}: {reason}")
  elif member.isdir():
    archive.folders.update(_with_parents(name))
  elif name.endswith(".tar") and not folder:
    inner = _Window(window.descriptor, window.start + member.offset_data, member.size)
    folder = name.removesuffix(".tar")
    archive.folders.update(_with_parents(folder))
    _list(inner, f"{path}/{name}", folder, archive)
  else:
    archive.folders.update(_with_parents(os.path.dirname(name)))
    if not is_image_name(name):
      archive.ignored[os.path.splitext(name)[1].lower() or "without extension"] += 1
      return
    if name in archive.images:
      archive.left_out.append(f"{one_line(name)}: a later member of this name stands for it")
    archive.images[name] = (window.start + member.offset_data, member.size)


def _objection(member: tarfile.TarInfo, parts: list[str]) -> str:
  """Why a member is not even looked at; empty if it may be."""
  if ".." in parts or member.name.startswith("/"):
    return "the name leads out of the archive"
  if member.islnk() or member.issym():
    return f"a link (to {one_line(member.linkname)}), which is not followed"
  if not (member.isreg() or member.isdir()):
    return "neither a file nor a folder"
  if member.sparse is not None:
    return "a sparse file, whose bytes do not lie in one piece"
  return ""


def _with_parents(folder: str) -> list[str]:
  parts = folder.split("/") if folder else []
  return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _refuse_compressed(window: _Window, path: str) -> None:
  start = window.read(8)
  window.seek(0)
  for magic, kind in _COMPRESSED.items():
    if start.startswith(magic):
      raise ValueError(
        f"{path} is compressed ({kind}), so that no image can be found without unpacking all before"
        " it; expected a plain tar archive: decompress it first"
      )
