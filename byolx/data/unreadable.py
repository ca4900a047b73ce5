"""Logs unreadable records (examples), and stops the run if there are too many of them.

Large data sets often have a few damaged files, which should not stop a run of several days. The
loader replaces an unreadable record by another one in training, leaves it out of an evaluation, and
reports it to a `FailureLog`.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

logger = logging.getLogger("byolx")

TOLERATED = 10
"""Up to this number of unreadable records, a run continues, unless data.max_failed_share is 0."""

MIN_SEEN = 100
"""Number of distinct records to be seen (or all of a smaller source) before their share is checked."""


class TooManyFailuresError(ValueError):
  """Error: the share of unreadable records (examples) exceeds data.max_failed_share."""


class Failure(NamedTuple):
  """Record (example) of a source that cannot be read, and the reason.

  Attributes:
    record: index of the record in the source.
    reason: error message, which starts with the name of the file or record.
  """

  record: int
  reason: str


class FailureLog:
  """Logs unreadable records (examples), and raises an error if there are too many of them.

  Each reason is logged once. The main process calls `add` for each batch that is used, in order. So the
  counts do not depend on the number of worker processes. Each iterator over batches, and each host, has
  its own counts. Several iterators can share the set `named`, so that none of them repeats a message.

  There are too many unreadable records if two conditions hold. More than ten (`TOLERATED`) distinct
  records are unreadable. They are also more than the share `max_failed_share` of all distinct records
  seen. The check starts when 100 (`MIN_SEEN`) distinct records, or all records of the source, were seen.
  If `max_failed_share` is 0, the first unreadable record raises the error.

  Args:
    name: name of the data source, for the log.
    records: number of records (examples) of the source.
    max_failed_share: largest share of unreadable records, 0 to 1; the field data.max_failed_share.
    consequence: words for the log about what the loader does with an unreadable record, such as "it
      is left out".
    named: reasons already logged. They are not logged again. New reasons are added. None for an
      empty set.

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
    """Counts the records (examples) of one batch, and logs the unreadable ones to the logger `byolx`.

    Args:
      index: index of the record in each row of the batch, -1 for a row without a record.
      failures: unreadable records met while loading the batch.

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
