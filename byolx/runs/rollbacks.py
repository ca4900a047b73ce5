"""Records the rollbacks of a run in its workdir.

A rollback goes back to an earlier checkpoint after training diverged. It leaves out the batches between
the checkpoint and the divergence.
"""

import dataclasses
import json
from pathlib import Path

from byolx.core import distributed, files

ROLLBACKS = "rollbacks.jsonl"


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One rollback: the return to an earlier checkpoint after training diverged.

  Attributes:
    number: number of the rollback in the run, from 1.
    at: step at which training diverged.
    to: step of the checkpoint from which training continues.
    left_out: number of batches that are skipped after step `to`.
    reason: message of the divergence.
  """

  number: int
  at: int
  to: int
  left_out: int
  reason: str


class Rollbacks:
  """The rollbacks of a run (returns to an earlier checkpoint after a divergence).

  Each rollback is written to disk before training continues, and leaves out batches.

  Args:
    workdir: folder of the run.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / ROLLBACKS
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self._all = [Rollback(**json.loads(line)) for line in lines]

  @property
  def count(self) -> int:
    """Number of rollbacks (returns to an earlier checkpoint after a divergence) of the run so far."""
    return max((rollback.number for rollback in self._all), default=0)

  def skipped(self, step: int) -> int:
    """Returns the number of batches that were left out before training step `step` + 1.

    A rollback returns to an earlier checkpoint after a divergence. It leaves out the batches between the
    checkpoint and the divergence.
    """
    return sum(rollback.left_out for rollback in self._all if rollback.to <= step)

  def skipped_before(self, step: int) -> int:
    """Returns the number of batches that were left out before training step `step`.

    A rollback returns to an earlier checkpoint after a divergence. It leaves out the batches between the
    checkpoint and the divergence.
    """
    return sum(rollback.left_out for rollback in self._all if rollback.to < step)

  def segments(self, start: int) -> list[tuple[int, int | None]]:
    """Divides the steps after `start` into ranges in which no training batch is left out.

    A rollback returns to an earlier checkpoint after a divergence. It leaves out the batches between the
    checkpoint and the divergence. So each range but the last ends at such a checkpoint.

    Returns:
      Pairs (before, end), one per range, for the steps `before` + 1 to `end`. The end of the last range
      is None, because this range has no last step.
    """
    cuts = [start, *sorted({rollback.to for rollback in self._all if rollback.to > start})]
    return list(zip(cuts, [*cuts[1:], None], strict=True))

  def add(self, at: int, to: int, reason: str) -> None:
    """Adds a rollback, which leaves out the batches between a checkpoint and a divergence.

    Earlier rollbacks to later checkpoints are removed: their batches are among those left out.

    Args:
      at: step of the divergence.
      to: step of the checkpoint.
      reason: message of the divergence.
    """
    left_out = at + self.skipped(at) - to - self.skipped(to)
    earlier = [rollback for rollback in self._all if rollback.to <= to]
    self._all = [*earlier, Rollback(self.count + 1, at, to, left_out, reason)]
    lines = [json.dumps(dataclasses.asdict(rollback)) + "\n" for rollback in self._all]
    if distributed.is_writer():
      files.write_atomically(self._path, "".join(lines))
