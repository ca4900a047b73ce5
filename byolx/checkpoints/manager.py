"""Saves the checkpoints of a run in the background, restores and verifies them, and removes old ones.

An interrupted save leaves no checkpoint. A restore verifies the checksums. If a checkpoint is
damaged, the restore logs a warning and reads the previous checkpoint. If a checkpoint belongs to
another model, the restore raises an error that names the differences.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from byolx.checkpoints import checksums, storage
from byolx.checkpoints.storage import FORMAT, CheckpointError, DamagedError, named
from byolx.core import distributed, text
from byolx.core.fields import above, at_least, field, one_of

__all__ = [
  "FORMAT",
  "CheckpointError",
  "Checkpoints",
  "DamagedError",
  "Policy",
  "Restored",
  "named",
]

Tree = TypeVar("Tree")
Result = TypeVar("Result")

LOG = logging.getLogger("byolx")


@dataclasses.dataclass(frozen=True)
class Policy:
  """The config group `checkpoint`: when checkpoints are saved, and which of them are kept."""

  every_epochs: float = field(1.0, "epochs between checkpoints", above(0), free=True)
  every_steps: int = field(
    0, "steps between additional checkpoints; 0: none", at_least(0), free=True
  )
  every_minutes: float = field(
    0.0, "minutes between additional checkpoints; 0: none", at_least(0), free=True
  )
  keep: int = field(2, "number of latest checkpoints to keep", at_least(1), free=True)
  keep_every: int = field(
    0,
    "steps between checkpoints that are never deleted, the multiples of this number; 0: none",
    at_least(0),
    free=True,
  )
  best: str = field(
    "",
    "metric, such as loss, whose best checkpoint is kept in addition; empty: none",
    free=True,
  )
  best_mode: str = field(
    "min",
    "best value of checkpoint.best: the smallest or the largest",
    one_of("min", "max"),
    free=True,
  )

  def kept(self, steps: list[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
    """Returns the steps whose checkpoints are kept; all other checkpoints may be removed.

    Args:
      steps: steps of all checkpoints.
      metrics: metrics saved with the checkpoints, by step and name.
    """
    latest = sorted(steps)[-self.keep :]
    milestones = [step for step in steps if self.keep_every and step % self.keep_every == 0]
    values = {step: metrics.get(step, {}).get(self.best, math.nan) for step in sorted(steps)}
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    choose = {"min": min, "max": max}[self.best_mode]
    best = [choose(values, key=values.__getitem__)] if values else []
    return {*latest, *milestones, *best}


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: training step of the checkpoint.
    state: restored pytree of arrays, with the structure and shardings that the caller asked for.
    data: numbers that give the position in the training data from which training resumes, by name.
    meta: facts about the run, such as its commit and config.
  """

  step: int
  state: Any
  data: dict[str, Any]
  meta: dict[str, Any]


class Checkpoints:
  """Saves, restores and removes the checkpoints of one run.

  In a multi-process run, all processes must make the same calls, on a folder that they share.

  Args:
    folder: folder of the checkpoints; the first save creates it.
    policy: rule that selects the checkpoints to keep.
  """

  def __init__(self, folder: Path, policy: Policy = Policy()):
    self._folder, self._policy = folder, policy
    self._writer: storage.Writer | None = None
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._metrics: dict[int, dict[str, float]] = {}

  @property
  def saving(self) -> bool:
    """Whether a save is in progress in the background."""
    return self._thread is not None and self._thread.is_alive()

  def steps(self) -> list[int]:
    """Returns the steps of all completed checkpoints, in ascending order.

    The checkpoints are not verified.
    """
    return distributed.agree(steps_in(self._folder))

  def latest(self) -> int | None:
    """Returns the largest step of a completed checkpoint, or None if there is no checkpoint."""
    return max(self.steps(), default=None)

  def save(
    self,
    step: int,
    state: Any,
    data: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> float:
    """Starts to save a checkpoint in the background.

    If another save is in progress, the method waits for its end before it starts the new one. It
    saves nothing if a checkpoint of this step exists already.

    Args:
      step: training step; it becomes the name of the checkpoint's folder.
      state: pytree of arrays, which may be donated after the call.
      data: position in the training data from which training resumes, serialisable as JSON.
      meta: facts about the run, such as its commit and config, serialisable as JSON.
      metrics: metrics of this step by name. The policy selects the best checkpoint by them, and
        summaries show them.

    Returns:
      Time that the caller was blocked, in seconds.

    Raises:
      CheckpointError: this save could not start, or the previous save failed.
      TypeError: `data`, `meta` or `metrics` is not serialisable as JSON.
    """
    began = time.monotonic()
    self.wait()
    if step in self.steps():
      return time.monotonic() - began
    record = {
      "format": FORMAT,
      "step": step,
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "data": data,
      "meta": meta,
      "metrics": metrics or {},
    }
    json.dumps(record)  # raises here, not in the background, if it cannot be written
    try:
      self._writer = self._writer or storage.Writer()
      if distributed.is_writer():
        self._folder.mkdir(parents=True, exist_ok=True)
        _clean(self._folder)
      distributed.barrier("checkpoints")
      arrays = named(state)
      self._writer.save(self._folder / str(step), arrays, record, checksums.start(arrays).result)
    except (OSError, ValueError) as error:
      raise CheckpointError(self._failed(step, error)) from error
    self._metrics[step] = record["metrics"]
    self._thread = threading.Thread(target=self._complete, args=(step,), name=f"save {step}")
    self._thread.start()
    return time.monotonic() - began

  def restore(
    self,
    abstract: Tree,
    step: int | None = None,
    accept: Callable[[int, dict[str, Any]], None] | None = None,
  ) -> Restored:
    """Restores the checkpoint of a given step, or the newest undamaged checkpoint.

    If no step is given and a checkpoint is damaged, a warning is logged and the previous checkpoint
    is read.

    Args:
      abstract: pytree with the structure of the saved state. In place of each array it has a
        `jax.ShapeDtypeStruct` with a sharding.
      step: training step of the checkpoint; None for the newest undamaged one.
      accept: function that takes the step and the saved position in the training data. It is called
        before the arrays are read, and raises an error to refuse the checkpoint. None to accept any.

    Raises:
      ValueError: names, shapes or types of the checkpoint's arrays differ from those of `abstract`.
      CheckpointError: there is no such checkpoint, it is damaged, or it has a newer format.
    """
    templates, steps = named(abstract), self.steps()
    if step is not None and step not in steps:
      saved = ", ".join(map(str, steps)) or "none"
      raise CheckpointError(f"no checkpoint of step {step} in {self._folder}; saved steps: {saved}")
    if not steps:
      raise CheckpointError(f"no checkpoint in {self._folder}")
    candidates = steps[::-1] if step is None else [step]
    folders = [self._folder / str(candidate) for candidate in candidates]
    return first_good(folders, lambda folder: _restore(folder, abstract, templates, accept))

  def discard_after(self, step: int) -> None:
    """Removes the checkpoints of all steps after `step`, so that these steps can be saved again."""
    self.wait()
    if distributed.is_writer():
      for later in steps_in(self._folder):
        if later > step:
          self._remove(later)
    distributed.barrier("discard")

  def wait(self) -> None:
    """Waits for the end of the save in progress, and lets it write at full speed until then.

    Raises:
      CheckpointError: the save failed. The next call does not raise this error again.
    """
    if self._thread is not None:
      self._writer.stop_throttling()
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def close(self) -> None:
    """Waits for the save in progress, and ends the background threads."""
    try:
      self.wait()
    finally:
      if self._writer is not None:
        self._writer.close()
        self._writer = None

  def _complete(self, step: int) -> None:
    """Waits for the end of a step's save, then removes old checkpoints; runs in a background thread.

    If the save failed, the error is kept, and the next call of `wait` raises it.
    """
    try:
      self._writer.wait()
    except Exception as error:  # raised in the main thread by the next `wait`
      self._error = CheckpointError(self._failed(step, error))
      self._error.__cause__ = error
      if distributed.is_writer():
        _clean(self._folder)
      return
    if distributed.is_writer():
      try:
        self._prune()
      except OSError as error:
        LOG.warning("an old checkpoint could not be removed: %s", error)

  def _prune(self) -> None:
    steps = steps_in(self._folder)
    if self._policy.best:
      for step in steps:
        if step not in self._metrics:
          with contextlib.suppress(CheckpointError):
            self._metrics[step] = storage.read_record(self._folder / str(step))["metrics"]
    for step in set(steps) - self._policy.kept(steps, self._metrics):
      self._remove(step)

  def _remove(self, step: int) -> None:
    # Renamed before the removal, so that a folder named by a step always is a complete checkpoint.
    folder = self._folder / str(step)
    renamed = folder.with_name(f"{step}{storage.TEMPORARY}-removed")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed)
    self._metrics.pop(step, None)

  def _failed(self, step: int, error: Exception) -> str:
    """Returns the error message for a failed save of the checkpoint of a step."""
    last = max(steps_in(self._folder), default=None)
    older = "there is no earlier one" if last is None else f"the last one is of step {last}"
    reason = text.one_line(error)
    return f"the checkpoint of step {step} could not be saved in {self._folder}: {reason}; {older}"


def steps_in(folder: Path) -> list[int]:
  """Returns the steps of the completed checkpoints in a folder, in ascending order."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def folders_at(path: Path) -> list[Path]:
  """Returns the folders of all checkpoints in a workdir or folder, the newest first.

  Args:
    path: folder of a workdir, of its checkpoints, or of one checkpoint.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  if (path / "record").is_dir() or (path / "state").is_dir():
    return [path]
  inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  steps = distributed.agree(steps_in(inside))
  if not steps:
    raise CheckpointError(f"{path}: expected a workdir, or a checkpoint")
  return [inside / str(step) for step in steps[::-1]]


def first_good(folders: list[Path], read: Callable[[Path], Result]) -> Result:
  """Reads checkpoints in order, and returns the result for the first undamaged one.

  A warning is logged for each damaged checkpoint before it.

  Args:
    folders: folders of the checkpoints, in the order in which they are read.
    read: function that reads the checkpoint in a folder and raises DamagedError if it is damaged.

  Raises:
    CheckpointError: all checkpoints are damaged.
  """
  for number, folder in enumerate(folders):
    try:
      return read(folder)
    except DamagedError as error:
      message = f"the checkpoint of step {folder.name} in {folder.parent} is damaged: {error}"
      if len(folders) == 1:
        raise CheckpointError(message) from error
      older = folders[number + 1 :]
      LOG.warning("%s%s", message, f"; trying the one of step {older[0].name}" if older else "")
  raise CheckpointError(f"none of {len(folders)} checkpoints in {folders[0].parent} can be used")


def load(
  folder: Path, choose: Callable[[dict[str, Any]], Mapping[str, jax.ShapeDtypeStruct]]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """Reads record.json and some of the arrays of a checkpoint, and verifies the arrays' checksums.

  Args:
    folder: folder of the checkpoint.
    choose: function that selects the arrays to read. It takes the contents of record.json, and
      returns shape, type and sharding of each selected array, by array name.

  Returns:
    The contents of record.json, and the selected arrays by name.

  Raises:
    DamagedError: a file is missing or damaged.
    CheckpointError: the checkpoint has a newer format, or its files are not readable.
  """
  record = _on_all_processes(lambda: storage.read_record(folder))
  templates = choose(record)
  arrays = _on_all_processes(lambda: storage.read_arrays(folder, templates))
  sums = checksums.digests(arrays)
  _on_all_processes(lambda: storage.verify_checksums(record, sums))
  return record, arrays


def _restore(
  folder: Path,
  abstract: Any,
  templates: Mapping[str, jax.ShapeDtypeStruct],
  accept: Callable[[int, dict[str, Any]], None] | None,
) -> Restored:
  step = int(folder.name)

  def choose(record: dict[str, Any]) -> Mapping[str, jax.ShapeDtypeStruct]:
    if accept is not None:
      accept(step, record["data"])
    _refuse_other_arrays(step, record, templates)
    return templates

  record, arrays = load(folder, choose)
  leaves = [arrays[name] for name in templates]
  state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
  return Restored(step, state, record["data"], record["meta"])


def _clean(folder: Path) -> None:
  """Removes the temporary folders that interrupted saves and removals have left in a folder."""
  for path in folder.glob(f"*{storage.TEMPORARY}*"):
    shutil.rmtree(path, ignore_errors=True)


def _on_all_processes(work: Callable[[], Result]) -> Result:
  """Runs `work` in this process and returns its result; all processes must call this function.

  If `work` raises CheckpointError or DamagedError in one process, all processes raise such an
  error.
  """
  error: CheckpointError | None = None
  result: Any = None
  try:
    result = work()
  except CheckpointError as raised:
    error = raised
  refused = distributed.any_process(error is not None and not isinstance(error, DamagedError))
  damaged = distributed.any_process(isinstance(error, DamagedError))
  if refused:
    refusal = error if error and not isinstance(error, DamagedError) else None
    raise refusal or CheckpointError("another process could not read it")
  if damaged:
    raise error or DamagedError("another process could not read it")
  return result


def _refuse_other_arrays(
  step: int, record: Mapping[str, Any], templates: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Checks that a checkpoint has the same arrays as the state to restore.

  Args:
    step: training step of the checkpoint.
    record: contents of the checkpoint's record.json, with type and shape of each array.
    templates: shape and type of each array of the state, by name.

  Raises:
    ValueError: names, shapes or types differ.
  """
  expected = {name: storage.kind(array) for name, array in templates.items()}
  saved = {name: kind for name, (kind, _) in record["arrays"].items()}
  differences = [
    f"{name} is {saved.get(name, 'missing')}, expected {expected.get(name, 'no such array')}"
    for name in expected | saved
    if saved.get(name) != expected.get(name)
  ]
  if differences:
    raise ValueError(
      f"checkpoint of step {step} holds another model: {text.first_few(differences)}"
    )
