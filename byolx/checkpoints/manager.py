"""The checkpoints of a run: saved in the background, the newest good one restored, some kept.

A save that is cut off leaves no step behind. What is damaged is found by its digests when it is
restored, said, and passed over; a checkpoint of another model is refused by what differs.
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

  every_epochs: float = field(1.0, "between checkpoints", above(0), free=True)
  every_steps: int = field(0, "between checkpoints as well; 0: off", at_least(0), free=True)
  every_minutes: float = field(0.0, "between checkpoints as well; 0: off", at_least(0), free=True)
  keep: int = field(2, "latest checkpoints kept", at_least(1), free=True)
  keep_every: int = field(
    0, "steps: those of every so many are kept for ever; 0: none", at_least(0), free=True
  )
  best: str = field(
    "", "a metric, such as loss: the step with its best value is kept too; empty: none", free=True
  )
  best_mode: str = field("min", "what is best of checkpoint.best", one_of("min", "max"), free=True)

  def kept(self, steps: list[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
    """The steps that stay, of those there are."""
    latest = sorted(steps)[-self.keep :]
    milestones = [step for step in steps if self.keep_every and step % self.keep_every == 0]
    values = {step: metrics.get(step, {}).get(self.best, math.nan) for step in sorted(steps)}
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    choose = {"min": min, "max": max}[self.best_mode]
    best = [choose(values, key=values.__getitem__)] if values else []
    return {*latest, *milestones, *best}


class Restored(NamedTuple):
  """A checkpoint in memory: its state as asked for, the data position, facts about the run."""

  step: int
  state: Any
  data: dict[str, Any]
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in `folder`, which is made by the first save.

  With several processes, all of them make the same calls, on a folder that they share.
  """

  def __init__(self, folder: Path, policy: Policy = Policy()):
    self._folder, self._policy = folder, policy
    self._writer: storage.Writer | None = None
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._metrics: dict[int, dict[str, float]] = {}

  @property
  def saving(self) -> bool:
    """Whether a save is under way in the background."""
    return self._thread is not None and self._thread.is_alive()

  def steps(self) -> list[int]:
    """The steps that were saved and are whole as far as their folders tell, in order."""
    return distributed.agree(steps_in(self._folder))

  def latest(self) -> int | None:
    """The newest of `steps`, or None."""
    return max(self.steps(), default=None)

  def save(
    self,
    step: int,
    state: Any,
    data: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> float:
    """Starts a save in the background. A step that is there already stays as it is.

    Args:
      step: names the checkpoint.
      state: a pytree of arrays; they may be donated as soon as this returns.
      data: where the input stands, as JSON.
      meta: facts about the run, as JSON.
      metrics: of this step, for the policy and for people.

    Returns:
      Seconds that the caller had to wait.

    Raises:
      CheckpointError: this save could not start, or the one before did not succeed.
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
    json.dumps(record)  # what cannot be written is an error here, not in the background
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
    """A step's state, placed as `abstract` says; the newest good one unless a step is given.

    A damaged checkpoint is said in the log, and the one before is tried.

    Args:
      abstract: a pytree like the one saved, of `jax.ShapeDtypeStruct` with shardings.
      step: this one or none.
      accept: looks at the step and the data position before the arrays, and may raise.

    Raises:
      ValueError: the checkpoint's arrays are not those of `abstract`.
      CheckpointError: there is none, it is damaged, or of a newer format.
    """
    wanted, steps = named(abstract), self.steps()
    if step is not None and step not in steps:
      there = ", ".join(map(str, steps)) or "none"
      raise CheckpointError(f"no checkpoint of step {step} in {self._folder}; there are: {there}")
    if not steps:
      raise CheckpointError(f"no checkpoint in {self._folder}")
    tries = steps[::-1] if step is None else [step]
    folders = [self._folder / str(candidate) for candidate in tries]
    return first_good(folders, lambda folder: _restore(folder, abstract, wanted, accept))

  def discard_after(self, step: int) -> None:
    """Removes the checkpoints of later steps, so that these can be saved again."""
    self.wait()
    if distributed.is_writer():
      for later in steps_in(self._folder):
        if later > step:
          self._remove(later)
    distributed.barrier("discard")

  def wait(self) -> None:
    """Waits for the save under way, which then takes no rests.

    Raises:
      CheckpointError: it did not succeed; said once.
    """
    if self._thread is not None:
      self._writer.hurry()
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def close(self) -> None:
    """Waits as well, and ends the background."""
    try:
      self.wait()
    finally:
      if self._writer is not None:
        self._writer.close()
        self._writer = None

  def _complete(self, step: int) -> None:
    """In the background: the end of a save, and of those that need not be kept any longer."""
    try:
      self._writer.wait()
    except Exception as error:  # whatever stopped it, the run has to hear of it
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
    """Renamed first: a step that is there is whole."""
    folder = self._folder / str(step)
    doomed = folder.with_name(f"{step}{storage.TEMPORARY}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
    self._metrics.pop(step, None)

  def _failed(self, step: int, error: Exception) -> str:
    good = max(steps_in(self._folder), default=None)
    stays = "there is none before it" if good is None else f"the one of step {good} stays"
    reason = text.one_line(error)
    return f"the checkpoint of step {step} could not be saved in {self._folder}: {reason}; {stays}"


def steps_in(folder: Path) -> list[int]:
  """The steps of a folder of checkpoints, in order; those being written are not among them."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def folders_at(path: Path) -> list[Path]:
  """The checkpoints of a workdir, of a folder of checkpoints, or this one alone; newest first.

  Raises:
    CheckpointError: there is none.
  """
  if (path / "record").is_dir() or (path / "state").is_dir():
    return [path]
  inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  steps = distributed.agree(steps_in(inside))
  if not steps:
    raise CheckpointError(f"{path}: expected a workdir, or a checkpoint")
  return [inside / str(step) for step in steps[::-1]]


def first_good(folders: list[Path], read: Callable[[Path], Result]) -> Result:
  """What `read` makes of the first checkpoint that is not damaged; the others are said in the log.

  Raises:
    CheckpointError: all are damaged.
  """
  for number, folder in enumerate(folders):
    try:
      return read(folder)
    except DamagedError as error:
      said = f"the checkpoint of step {folder.name} in {folder.parent} is damaged: {error}"
      if len(folders) == 1:
        raise CheckpointError(said) from error
      older = folders[number + 1 :]
      LOG.warning("%s%s", said, f"; trying the one of step {older[0].name}" if older else "")
  raise CheckpointError(f"none of {len(folders)} checkpoints in {folders[0].parent} can be used")


def load(
  folder: Path, choose: Callable[[dict[str, Any]], Mapping[str, jax.ShapeDtypeStruct]]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """A checkpoint's record, and those of its arrays that `choose` picks by it; checked.

  Raises:
    DamagedError: not as they were saved, or missing.
    CheckpointError: of a newer format, or they must not be read.
  """
  record = _together(lambda: storage.read_record(folder))
  wanted = choose(record)
  arrays = _together(lambda: storage.read_arrays(folder, wanted))
  found = checksums.digests(arrays)
  _together(lambda: storage.check_digests(record, found))
  return record, arrays


def _restore(
  folder: Path,
  abstract: Any,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  accept: Callable[[int, dict[str, Any]], None] | None,
) -> Restored:
  step = int(folder.name)

  def choose(record: dict[str, Any]) -> Mapping[str, jax.ShapeDtypeStruct]:
    if accept is not None:
      accept(step, record["data"])
    _refuse_other_arrays(step, record, wanted)
    return wanted

  record, arrays = load(folder, choose)
  leaves = [arrays[name] for name in wanted]
  state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
  return Restored(step, state, record["data"], record["meta"])


def _clean(folder: Path) -> None:
  """Removes what a save or a removal that was cut off has left."""
  for path in folder.glob(f"*{storage.TEMPORARY}*"):
    shutil.rmtree(path, ignore_errors=True)


def _together(work: Callable[[], Result]) -> Result:
  """Does it in every process; what fails in one fails in all."""
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
  step: int, record: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Raises ValueError unless the two have the same names, shapes and types."""
  here = {name: storage.kind(array) for name, array in wanted.items()}
  there = {name: kind for name, (kind, _) in record["arrays"].items()}
  differences = [
    f"{name} is {there.get(name, 'missing')}, expected {here.get(name, 'no such array')}"
    for name in here | there
    if there.get(name) != here.get(name)
  ]
  if differences:
    raise ValueError(
      f"checkpoint of step {step} holds another model: {text.first_few(differences)}"
    )
