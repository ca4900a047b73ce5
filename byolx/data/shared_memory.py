"""Shared memory: batches that a worker process fills and the training process reads without a copy.

A worker writes a batch into a memfd, memory without a name in the file system, and sends a
`BufferHandle`. The training process maps the same memory. A flag in its last byte is cleared when the
last array on it is deleted, and the worker then reuses the memory, because new memory pages are slow
on first use. The memory is freed however the processes end, and does not need /dev/shm, which has
only 64 MB in many containers.

This needs Linux. If `POSSIBLE` is False, arrays are allocated anew and grain sends them.
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
  """Address of a uint8 array in shared memory, valid in all processes.

  Attributes:
    pid: process that owns the memory.
    fd: file descriptor of the memory in that process; the array starts at its first byte.
    shape: shape of the array.
  """

  pid: int
  fd: int
  shape: tuple[int, ...]


class Buffers:
  """Shared memory of the process that fills it, in as many pieces as were ever in use at once.

  Pickling leaves out the memory: each process has its own pieces.
  """

  def __init__(self):
    self._pieces: list[tuple[int, mmap.mmap]] = []

  def __reduce__(self):
    return Buffers, ()

  def take(
    self, *shape: int
  ) -> tuple[UInt8[np.ndarray, "..."], UInt8[np.ndarray, "..."] | BufferHandle]:
    """Returns an uninitialised uint8 array, and the handle to send once it is filled.

    If shared memory is not possible, the array is its own handle.
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
  """Maps the shared memory of workers into the training process."""

  def __init__(self):
    self._pieces: dict[tuple[int, int], mmap.mmap] = {}

  def open(self, handle: UInt8[np.ndarray, "..."] | BufferHandle) -> UInt8[np.ndarray, "..."]:
    """Returns the array of a handle; the memory is in use until the array and all its views are deleted.

    Args:
      handle: a handle, or an array, which is returned unchanged.

    Raises:
      OSError: the worker has ended.
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
