"""Retries reads from storage that is unavailable for a short time.

The loader replaces or leaves out a record that cannot be read. While a network file system is being
remounted, however, every read would fail. A read is therefore retried, after longer and longer pauses,
if the error is transient or the data folder is missing. If the folder stays missing, the run ends with an
error that names the folder. When the run is started again, it continues from its last checkpoint.
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
"""Pauses before the successive retries of a read, in seconds; 37.6 s in total."""

TRANSIENT = frozenset(
  {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENFILE, errno.EMFILE, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
  }
)  # fmt: skip
"""Numbers of the OSErrors that are retried, those of network storage; EIO may also be a bad disk."""


class FolderLostError(OSError):
  """Error: the folder of a data set is missing, and did not come back during all retries."""


def with_retries(read: Callable[[], Result], folder: str) -> Result:
  """Calls `read` and returns its result. After a DecodeError, the call may be repeated.

  It is repeated if the error is transient (a temporary failure of the storage) or the folder is missing.
  There is a pause before each repetition.

  Args:
    read: function that reads a record. If this fails, it raises a DecodeError. If an OSError was the
      reason, it is the `__cause__` of the DecodeError.
    folder: path of the data set's folder.

  Raises:
    DecodeError: `read` failed, and the error is not transient or remained after all retries.
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
