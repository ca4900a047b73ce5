"""Storage that goes away for a while: reading is tried again, with growing pauses.

A record that cannot be decoded is replaced at once (see `failures`), but a network file system that
is being remounted would cost every record in turn. So errors that pass, and a data folder that is
not there any more, are waited for; a folder that stays away ends the run with its name, and the run
goes on from its last checkpoint once the folder is back.
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
"""Seconds before each new attempt: under a minute in all."""

PASSING = frozenset(
  {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENFILE, errno.EMFILE, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
  }
)  # fmt: skip
"""What network file systems report when they are not there; also EIO, which a bad sector gives."""


class FolderLostError(OSError):
  """The folder of a data set is gone."""


def patiently(read: Callable[[], Result], folder: str) -> Result:
  """Calls `read`, and again after a pause where what went wrong may pass.

  Args:
    read: raises DecodeError, from the OSError behind it if there is one.
    folder: of the data set.

  Raises:
    DecodeError: the record itself is bad, or its error did not pass.
    FolderLostError: the folder is not there any more.
  """
  for pause in (*PAUSES, None):
    try:
      return read()
    except DecodeError as error:
      lost = not os.path.isdir(folder)
      passing = isinstance(error.__cause__, OSError) and error.__cause__.errno in PASSING
      if pause is None and lost:
        raise FolderLostError(
          f"data.folder {folder} is gone, and did not come back in {sum(PAUSES):.0f} s; expected the"
          f" folder that the run began with (the last record asked for: {error})"
        ) from None
      if pause is None or not (lost or passing):
        raise
      logger.warning("%s; trying again in %.1f s", error, pause)
      time.sleep(pause)
  raise AssertionError("the last attempt returns or raises")
