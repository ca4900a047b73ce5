"""Log and limit of unreadable records: each is logged once, and too many of them stop the run.

Large data sets often have a few damaged files, which should not stop a run of several days. The
loader replaces an unreadable record by another one, or leaves it out of an evaluation, and reports
it here.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

logger = logging.getLogger("byolx")

TOLERATED = 10
"""Number of unreadable records that never stops a run, unless data.max_failed_share is 0."""

MIN_SEEN = 100
"""Number of distinct records, or all of a smaller source, seen before the share is checked."""


class TooManyFailuresError(ValueError):
  """The share of unreadable records exceeds data.max_failed_share."""


class Failure(NamedTuple):
  """A record that cannot be read.

  Attributes:
    record: index of the record in the source.
    reason: error message, which starts with the name of the file.
  """

  record: int
  reason: str


class FailureLog:
  """Logs each unreadable record once, to the logger `byolx`, and raises if there are too many.

  The log runs in the main process, on the failures of each batch, in the order of the batches. So
  the counts do not depend on the number of workers, and a record is logged when its batch is used.
  Each iterator and each host has its own counts. Logged reasons are added to `named`, which the
  iterators of a run share.

  There are too many unreadable records if they exceed `TOLERATED` and `max_failed_share` of the
  distinct records seen, once `MIN_SEEN` records or the whole source were seen. With a share of 0,
  the first unreadable record is too many.

  Args:
    name: name of the source.
    records: number of records of the source.
    max_failed_share: largest share of unreadable records, 0 to 1; the field data.max_failed_share.
    consequence: description in the log of the treatment of an unreadable record.
    named: reasons already logged, which are not logged again; new reasons are added.

  Raises:
    ValueError: the share is outside [0, 1].
  """

  def __init__(
    self,
    name: str,
    records: int,
    max_failed_share: float,
    consequence: str,
    named: set[str] | None = None,
  ):
    if not 0 <= max_failed_share <= 1:
      raise ValueError(f"data.max_failed_share is {max_failed_share}; expected 0 to 1")
    self._name = name
    self._max_failed_share = max_failed_share
    self._consequence = consequence
    self._seen = np.zeros(records, bool)
    self._failed: set[int] = set()
    self._named = set() if named is None else named

  def add(self, index: Int32[np.ndarray, "b"], failures: Sequence[Failure]) -> None:
    """Adds one batch.

    Args:
      index: record of each row of the batch, -1 for a row without a record.
      failures: unreadable records of the batch.

    Raises:
      TooManyFailuresError: there are too many unreadable records.
    """
    self._seen[index[index >= 0]] = True
    for record, reason in failures:
      self._seen[record] = True
      self._failed.add(record)
      if reason not in self._named:
        self._named.add(reason)
        logger.warning(
          "%s: record %d cannot be read, %s: %s", self._name, record, self._consequence, reason
        )
    if failures and self._too_many():
      raise TooManyFailuresError(
        f"{self._name}: {len(self._failed)} of the {self._seen.sum()} records seen cannot be read,"
        f" the last one being {failures[-1].reason}; expected at most a share of"
        f" data.max_failed_share = {self._max_failed_share}"
      )

  def _too_many(self) -> bool:
    if self._max_failed_share == 0:
      return True
    seen = int(self._seen.sum())
    if seen < min(MIN_SEEN, len(self._seen)):
      return False
    return len(self._failed) > max(TOLERATED, self._max_failed_share * seen)
