"""Shared memory, which a worker process fills with a batch and the training process reads directly.

A worker writes a batch into a memfd (memory that has no name in the file system) and sends a
`BufferHandle`. With it, the training process maps the same memory. The last byte of the memory is a
flag. The training process clears the flag when the last array in this memory is deleted. The worker then
writes another batch into the same memory, because new memory is slow on first use. The memory is freed
however the processes end. It does not need /dev/shm, which has only 64 MB in many containers.

This needs Linux. On other systems, `POSSIBLE` is False, and each batch is a newly allocated array. The
library grain, which runs the workers, then sends the array to the training process.
"""

import ctypes
import math
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

POSSIBLE = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")

_FREE, _IN_USE = 0, 1  # values of the flag


class BufferHandle(NamedTuple):
  """Address of a uint8 array in shared memory; one process sends it to another.

  Attributes:
    pid: id of the process that allocated the memory.
    fd: file descriptor of the memory in that process; the array starts at the first byte.
    shape: shape of the array.
  """

  pid: int
  fd: int
  shape: tuple[int, ...]


class Buffers:
  """Pieces of shared memory that this process allocates, fills and reuses.

  A new piece is allocated if no free one is large enough. The pieces are not pickled: a copy in another
  process starts with none.
  """

  def __init__(self):
    self._pieces: list[tuple[int, mmap.mmap]] = []

  def __reduce__(self):
    return Buffers, ()

  def take(
    self, *shape: int
  ) -> tuple[UInt8[np.ndarray, "..."], UInt8[np.ndarray, "..."] | BufferHandle]:
    """Returns an uninitialised uint8 array in shared memory, and its handle for other processes.

    The handle is to be sent when the array is filled. If the system has no shared memory (`POSSIBLE` is
    False), the array is an ordinary one, and is itself returned as the handle.

    Args:
      *shape: shape of the array.
    """
    if not POSSIBLE:
      array = np.empty(shape, np.uint8)
      return array, array
    size = math.prod(shape)
    fd, piece = self._free_piece(size)
    piece[-1] = _IN_USE
    array = np.frombuffer(piece, np.uint8, count=size).reshape(shape)
    return array, BufferHandle(os.getpid(), fd, shape)

  def _free_piece(self, size: int) -> tuple[int, mmap.mmap]:
    for piece in self._pieces:
      if len(piece[1]) > size and piece[1][-1] == _FREE:
        return piece
    fd = os.memfd_create("byolx-batch")
    weakref.finalize(self, os.close, fd)
    os.ftruncate(fd, size + 1)  # the last byte is the flag
    self._pieces.append((fd, mmap.mmap(fd, size + 1)))
    return self._pieces[-1]


class BufferReader:
  """Gives the training process access to arrays in the shared memory of worker processes."""

  def __init__(self):
    self._pieces: dict[tuple[int, int], mmap.mmap] = {}

  def open(self, handle: UInt8[np.ndarray, "..."] | BufferHandle) -> UInt8[np.ndarray, "..."]:
    """Returns the array that a worker process filled, without a copy.

    The worker does not reuse the memory until the array and all its numpy views are deleted.

    Args:
      handle: handle of the array; or an array, which is returned unchanged.

    Raises:
      OSError: the worker process has ended.
    """
    if not isinstance(handle, BufferHandle):
      return handle
    key = (handle.pid, handle.fd)
    if key not in self._pieces:
      with open(f"/proc/{handle.pid}/fd/{handle.fd}", "r+b", buffering=0) as file:
        self._pieces[key] = mmap.mmap(file.fileno(), 0)
    piece = self._pieces[key]
    # Every view refers to this object: numpy skips arrays between a view and its memory, but not this.
    memory = (ctypes.c_ubyte * math.prod(handle.shape)).from_buffer(piece)
    weakref.finalize(memory, _release, piece).atexit = False
    return np.frombuffer(memory, np.uint8).reshape(handle.shape)


def _release(piece: mmap.mmap) -> None:
  piece[-1] = _FREE
