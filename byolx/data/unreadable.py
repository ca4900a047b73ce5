"""Records that cannot be read: each is named once, and too many of them stop the run.

A large data set has a few broken files, and a run of days should not end at the first one. The
pipeline puts another record in its place and reports it here.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

logger = logging.getLogger("byolx")

HANDFUL = 10
"""So many unreadable records never stop a run, unless data.max_failed_share is 0."""

ENOUGH = 100
"""A share of unreadable records is judged once so many records, or all, were seen."""


class TooManyFailuresError(ValueError):
  """So many records cannot be read that the run stops."""


class Failure(NamedTuple):
  """A record that could not be read; the reason starts with the file's name."""

  record: int
  reason: str


class FailureLog:
  """Names every unreadable record once, in the log `byolx`, and raises when there are too many.

  It runs in the main process, on what the batches report, in the order of the batches. So the
  counts are the same with a thread and with worker processes, and nothing is said about a record
  before its batch is used. The counts start anew with the iterator; every host has its own. What
  was named already is remembered in `named`, which the iterators of a run share.

  Too many means: more than `max_failed_share` of the distinct records seen, and more than a
  `HANDFUL`, once `ENOUGH` records or the whole source were seen. With a share of 0 the first one
  is too many.

  Args:
    name: of the source.
    records: how many the source has.
    max_failed_share: 0 to 1, the field data.max_failed_share.
    consequence: what happens to an unreadable record, for the message.
    named: reasons that were logged before, and will not be again; grows.

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
    """Takes note of one batch: the records in it (-1 for none), and those that failed.

    Raises:
      TooManyFailuresError: too many have failed by now.
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
    if seen < min(ENOUGH, len(self._seen)):
      return False
    return len(self._failed) > max(HANDFUL, self._max_failed_share * seen)
