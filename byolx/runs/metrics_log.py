"""Writes a run's metrics to metrics.jsonl and TensorBoard, and prints progress lines."""

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
  """The config group `log`: how often metrics are written and progress lines are printed."""

  every_steps: int = field(50, "steps between rows of metrics.jsonl", at_least(1), free=True)
  every_seconds: float = field(10.0, "least seconds between progress lines", at_least(0), free=True)


class RunLog:
  """Writes the scalars of a run to metrics.jsonl and TensorBoard, and prints progress lines.

  Args:
    folder: folder for `metrics.jsonl` and `tensorboard/`.
    steps: number of steps of the whole run.
    steps_per_epoch: optimiser steps per epoch, a float.
    images_per_step: batch size, over all devices.
    start: step from which the run continues. Rows of later steps, which an earlier start wrote, are
      dropped.
    every_seconds: shortest time between progress lines, in seconds.
    writer: whether this process writes and prints; only one process of a run does.
    accuracy: name that progress lines show for the scalar `top1`.
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
    """Starts the clock for the images per second. Call it right before the first step."""
    self._last_time = self._printed = time.monotonic()

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes a row to metrics.jsonl and TensorBoard.

    Also prints a progress line if `every_seconds` have passed since the last one, or after the last
    step.

    Args:
      step: number of optimiser steps taken.
      scalars: values by name, with `loss` and optionally `top1` in [0, 1].
    """
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
    """Writes a scalar to TensorBoard, but not to metrics.jsonl.

    metrics.jsonl must not have values, such as waiting times, that differ when a run is repeated.
    """
    if self._writer:
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Writes what is still buffered, and closes metrics.jsonl and the TensorBoard file."""
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
  """Opens a log for appending, after removing incomplete lines and rows of steps after `start`."""
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
  """Reads the rows of a metrics.jsonl; returns an empty list if the file does not exist.

  A last line that is not JSON is ignored: a killed run may leave an incomplete one.

  Raises:
    ValueError: a line before the last is not JSON.
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
