"""Finds the images in tar archives, with the byte range of each image in the archive.

Nothing is extracted, so a name in an archive is never used as a path on disk. Members whose name leads
out of the archive, links and devices are left out, and recorded with the reason. A tar archive inside
the archive counts as a folder with the same name without `.tar`: ImageNet's training images are a tar
archive of `n01440764.tar` and 999 others.
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
  """Contents of a tar archive: images, folders, and members that are not used.

  Attributes:
    images: byte offset and size in bytes of each image, by its name in the archive, `folder/file.jpg`.
    folders: names of all folders, except hidden ones.
    left_out: one line `member: reason` for each member that was left out and might be an image.
    ignored: number of files that are not images, by extension.
  """

  images: dict[str, tuple[int, int]] = field(default_factory=dict)
  folders: set[str] = field(default_factory=set)
  left_out: list[str] = field(default_factory=list)
  ignored: Counter = field(default_factory=Counter)


def list_archive(path: str | Path) -> Archive:
  """Finds the images in an uncompressed tar archive.

  If two members have the same name, the later one is used, as by the command `tar`.

  Raises:
    ValueError: the file is compressed, damaged, truncated or not a tar archive.
    OSError: the file cannot be read.
  """
  archive = Archive()
  with open(path, "rb", buffering=0) as file:
    window = _Window(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    _list(window, str(path), "", archive)
  return archive


def read_member(path: str | Path, offset: int, size: int) -> bytes:
  """Reads the bytes of one image in an archive.

  Args:
    path: path of the archive.
    offset: position of the first byte of the image in the archive, from `Archive.images`.
    size: size of the image in bytes, from `Archive.images`.

  Raises:
    OSError: the archive cannot be read, or has become shorter.
  """
  with open(path, "rb", buffering=0) as file:
    data = os.pread(file.fileno(), size, offset)
  if len(data) != size:
    raise OSError(f"the archive ends after {len(data)} of {size} bytes")
  return data


def one_line(text: str) -> str:
  """Returns a text with its line breaks escaped, so that it fits on one line."""
  return text.replace("\n", "\\n").replace("\r", "\\r")


class _Window(io.RawIOBase):
  """File object that reads only `size` bytes of an open file, from byte `start` on."""

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
  """Reads all members of a tar archive, and adds them to `archive`.

  Args:
    window: bytes of the tar archive, which may itself be a member of another one.
    path: path of the tar archive for error messages.
    folder: folder to which the names of the members are relative; '' for the outer archive.
    archive: object to which the images, folders and other members are added.

  Raises:
    ValueError: the tar archive is compressed, damaged or truncated.
  """
  _refuse_compressed(window, path)
  try:
    with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile keeps all members: too much memory for millions
        _add(member, window, path, folder, archive)
  except tarfile.TarError as error:
    raise ValueError(f"{path}: {error}; expected a complete, uncompressed tar archive") from error
  # tarfile ends without an error at a damaged header: check for the end mark.
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
  if reason := _unusable(member, parts):
    member_name = f"{folder}.tar/{member.name}" if folder else member.name
    archive.left_out.append(f"{one_line(member_name)}: {reason}")
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
      archive.left_out.append(f"{one_line(name)}: replaced by a later member of this name")
    archive.images[name] = (window.start + member.offset_data, member.size)


def _unusable(member: tarfile.TarInfo, parts: list[str]) -> str:
  """Returns the reason why a member of an archive cannot be used, or '' if it can."""
  if ".." in parts or member.name.startswith("/"):
    return "the name leads out of the archive"
  if member.islnk() or member.issym():
    return f"a link (to {one_line(member.linkname)}), which is not followed"
  if not (member.isreg() or member.isdir()):
    return "neither a file nor a folder"
  if member.sparse is not None:
    return "a sparse file, whose bytes are not contiguous"
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
        f"{path} is compressed ({kind}), so images cannot be read at random; expected an"
        " uncompressed tar archive: decompress it first"
      )
