"""What a run writes: whole files, and while it trains metrics.jsonl, TensorBoard, progress lines."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from byolx.core.fields import at_least, field
from byolx.core.files import write_atomically
from byolx.core.text import duration


@dataclasses.dataclass(frozen=True)
class LogSpec:
  """The config group `log`."""

  every_steps: int = field(50, "between rows of metrics.jsonl", at_least(1), free=True)
  every_seconds: float = field(10.0, "between progress lines", at_least(0), free=True)


class RunLog:
  """Writers of one run.

  Args:
    folder: of `metrics.jsonl` and `tensorboard/`.
    steps: of the whole run.
    steps_per_epoch: as a float.
    images_per_step: batch size.
    start: step that the run continues from; later rows of an earlier attempt are dropped.
    every_seconds: between progress lines.
    writer: False in every process but the writer: nothing is written or printed.
    accuracy: what progress lines call the accuracy `top1` of a row.
  """

  def __init__(
    self,
    folder: Path,
    *,
    steps: int,
    steps_per_epoch: float,
    images_per_step: int,
    start: int,
    every_seconds: float,
    writer: bool = True,
    accuracy: str = "online top-1",
  ):
    self._accuracy = accuracy
    self._steps, self._per_epoch, self._images = steps, steps_per_epoch, images_per_step
    self._every = every_seconds
    self._last_step = start
    self._last_time = self._printed = time.monotonic()
    self._writer = writer
    if writer:
      self._file = _open_after(folder / "metrics.jsonl", start)
      self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

  def begin(self) -> None:
    """Starts the clock; call it when the first step is about to run."""
    self._last_time = self._printed = time.monotonic()

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Appends a row; prints a progress line when it is time."""
    if not self._writer:
      return
    now = time.monotonic()
    rate = self._images * (step - self._last_step) / max(now - self._last_time, 1e-9)
    epoch = step / self._per_epoch
    row = {"step": step, "epoch": round(epoch, 4), **scalars, "images_per_second": round(rate, 1)}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    for name, value in row.items():
      if name != "step":
        self._events.add_scalar(name, value, step)
    self._last_step, self._last_time = step, now
    if now - self._printed >= self._every or step == self._steps:
      self._printed = now
      print(self._line(step, epoch, row, rate), file=sys.stderr, flush=True)

  def event(self, step: int, name: str, value: float) -> None:
    """One number for TensorBoard alone: what differs from run to run does not belong into rows."""
    if self._writer:
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes all files."""
    if self._writer:
      self._file.close()
      self._events.close()

  def _line(self, step: int, epoch: float, row: dict, rate: float) -> str:
    left = self._images * (self._steps - step) / max(rate, 1e-9)
    parts = [
      f"step {step:>{len(str(self._steps))}}/{self._steps}",
      f"epoch {epoch:.1f}",
      f"loss {row['loss']:.4f}",
    ]
    if "top1" in row:
      parts.append(f"{self._accuracy} {100 * row['top1']:.1f}")
    return "  ".join([*parts, f"{rate:.0f} images/s", f"{duration(left)} left"])


def _open_after(path: Path, start: int):
  """Opens for appending, without rows after `start` and without a line that was cut off."""
  kept = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if row["step"] <= start:
        kept.append(line + "\n")
  write_atomically(path, "".join(kept))
  return path.open("a")


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl; without a last line that a killed run left half written.

  An empty list if there is no such file.

  Raises:
    ValueError: another line is not a JSON object.
  """
  if not path.exists():
    return []
  rows = []
  lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      if number == len(lines):
        break
      raise ValueError(f"{path}, line {number}: {line[:60]!r}; expected a JSON object") from None
    rows.append(row)
  return rows
