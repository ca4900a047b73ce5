"""Rollbacks after a divergence, each recorded on disk."""

import dataclasses
import json
from pathlib import Path

from byolx.core import distributed, files

ROLLBACKS = "rollbacks.jsonl"


@dataclasses.dataclass(frozen=True)
class Rollback:
  """Training diverged at step `at` and went back to step `to`, leaving out `left_out` batches."""

  number: int
  at: int
  to: int
  left_out: int
  reason: str


class Rollbacks:
  """The rollbacks of a workdir, each on disk before anything is done about it."""

  def __init__(self, workdir: Path):
    self._path = workdir / ROLLBACKS
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self._all = [Rollback(**json.loads(line)) for line in lines]

  @property
  def count(self) -> int:
    """How many there were."""
    return max((rollback.number for rollback in self._all), default=0)

  def skipped(self, step: int) -> int:
    """How many batches are left out before the batch of the step after `step`."""
    return sum(rollback.left_out for rollback in self._all if rollback.to <= step)

  def skipped_before(self, step: int) -> int:
    """How many had been left out when `step` was reached for the first time."""
    return sum(rollback.left_out for rollback in self._all if rollback.to < step)

  def segments(self, start: int) -> list[tuple[int, int | None]]:
    """The steps from `start` on, as (first, end) between the places where batches are left out."""
    cuts = [start, *sorted({rollback.to for rollback in self._all if rollback.to > start})]
    return list(zip(cuts, [*cuts[1:], None], strict=True))

  def add(self, at: int, to: int, reason: str) -> None:
    """One more: every batch between the checkpoint and the divergence is left out from now on."""
    left_out = at + self.skipped(at) - to - self.skipped(to)
    earlier = [rollback for rollback in self._all if rollback.to <= to]
    self._all = [*earlier, Rollback(self.count + 1, at, to, left_out, reason)]
    lines = [json.dumps(dataclasses.asdict(rollback)) + "\n" for rollback in self._all]
    if distributed.is_writer():
      files.write_atomically(self._path, "".join(lines))
