"""Arrays that are filled in one process, read in place in another, and then filled again.

Who makes batches writes into memory without a name in any file system (a memfd) and sends a `Loan`,
which says where it is; the training process maps the same memory. When the last array on it is
gone, a byte at its end says so, and the next batch is written there: fresh pages would cost a tenth
of the time that decoding takes. Nothing is left behind however a process ends, and the size of
/dev/shm, 64 MB in many containers, does not matter.

Linux only. Where `POSSIBLE` is false, arrays are fresh ones and go the way that grain sends them.
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

_FREE, _LENT = 0, 1


class Loan(NamedTuple):
  """Where a uint8 array lies: file `fd` of process `pid`, from its start."""

  pid: int
  fd: int
  shape: tuple[int, ...]


class Lender:
  """Memory to fill: as many pieces as were ever on loan at once. Pickled without any."""

  def __init__(self):
    self._pieces: list[tuple[int, mmap.mmap]] = []

  def __reduce__(self):
    return Lender, ()

  def take(self, *shape: int) -> tuple[UInt8[np.ndarray, "..."], UInt8[np.ndarray, "..."] | Loan]:
    """An array with any content, and what is sent once it is filled."""
    if not POSSIBLE:
      array = np.empty(shape, np.uint8)
      return array, array
    size = math.prod(shape)
    fd, piece = self._free_piece(size)
    piece[-1] = _LENT
    array = np.frombuffer(piece, np.uint8, count=size).reshape(shape)
    return array, Loan(os.getpid(), fd, shape)

  def _free_piece(self, size: int) -> tuple[int, mmap.mmap]:
    for piece in self._pieces:
      if len(piece[1]) > size and piece[1][-1] == _FREE:
        return piece
    fd = os.memfd_create("byolx-batch")
    weakref.finalize(self, os.close, fd)
    os.ftruncate(fd, size + 1)  # the last byte says whether the piece is free
    self._pieces.append((fd, mmap.mmap(fd, size + 1)))
    return self._pieces[-1]


class Borrower:
  """The training process's view of memory that is lent to it."""

  def __init__(self):
    self._pieces: dict[tuple[int, int], mmap.mmap] = {}

  def open(self, loan: UInt8[np.ndarray, "..."] | Loan) -> UInt8[np.ndarray, "..."]:
    """The array of a loan; it and its views hold the memory until the last of them is gone.

    An array that was sent as it is comes back as it is.

    Raises:
      OSError: the worker is gone.
    """
    if not isinstance(loan, Loan):
      return loan
    key = (loan.pid, loan.fd)
    if key not in self._pieces:
      with open(f"/proc/{loan.pid}/fd/{loan.fd}", "r+b", buffering=0) as file:
        self._pieces[key] = mmap.mmap(file.fileno(), 0)
    piece = self._pieces[key]
    # numpy forgets the arrays between a view and its memory, but not this object.
    memory = (ctypes.c_ubyte * math.prod(loan.shape)).from_buffer(piece)
    weakref.finalize(memory, _give_back, piece).atexit = False
    return np.frombuffer(memory, np.uint8).reshape(loan.shape)


def _give_back(piece: mmap.mmap) -> None:
  piece[-1] = _FREE
