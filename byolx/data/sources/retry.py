"""Retries of reads from storage that is unavailable for a short time.

A record that cannot be decoded is replaced at once (see `unreadable`). While a network file system
is being remounted, however, every record would fail. Transient errors, and reads while the data
folder is missing, are therefore retried after growing pauses. If the folder stays missing, the run
ends with an error that names it; started again, the run continues from its last checkpoint.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from byolx.data.decode import DecodeError

logger = logging.getLogger("byolx")
Result = TypeVar("Result")

PAUSES = (0.1, 0.5, 2.0, 5.0, 10.0, 20.0)
"""Pauses before the retries, in seconds; 37.6 s in total."""

TRANSIENT = frozenset(
  {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENFILE, errno.EMFILE, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
  }
)  # fmt: skip
"""Error numbers of unavailable network file systems; EIO may also be a bad sector of a disk."""


class FolderLostError(OSError):
  """The folder of a data set is missing after all retries."""


def with_retries(read: Callable[[], Result], folder: str) -> Result:
  """Calls `read`, and retries it after a transient error or while the folder is missing.

  Args:
    read: function to call; its errors are DecodeErrors, with the OSError, if any, as their cause.
    folder: path of the data set's folder.

  Raises:
    DecodeError: the error is not transient, or remained after all retries.
    FolderLostError: the folder is missing after all retries.
  """
  for pause in (*PAUSES, None):
    try:
      return read()
    except DecodeError as error:
      lost = not os.path.isdir(folder)
      transient = isinstance(error.__cause__, OSError) and error.__cause__.errno in TRANSIENT
      if pause is None and lost:
        raise FolderLostError(
          f"data.folder {folder} is gone, and did not come back in {sum(PAUSES):.0f} s; expected"
          f" the folder that the run started with (last record: {error})"
        ) from None
      if pause is None or not (lost or transient):
        raise
      logger.warning("%s; retry in %.1f s", error, pause)
      time.sleep(pause)
  raise AssertionError("the last attempt returns or raises")
