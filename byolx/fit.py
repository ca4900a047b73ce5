"""Training one workdir, whatever happens: checkpoints, stops, restarts, rollbacks.

A run goes on from its newest good checkpoint, and what it does then is what it would have done
without a stop: the state is restored bit for bit, the input is a function of the step, and rows of
`metrics.jsonl` after the checkpoint are dropped and written again.

SIGTERM and Ctrl-C let the step under way finish, save it, and end the run with `StoppedError`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import byolx
from byolx import (
  checkpoint,
  config,
  distributed,
  logs,
  metrics,
  origin,
  sharding,
  train,
)
from byolx.config import ConfigError
from byolx.experiment import Experiment
from byolx.stopping import Stop, StoppedError

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
      logs.write_atomically(self._path, "".join(lines))


def fit(exp: Experiment, workdir: Path) -> train.TrainState:
  """Trains from the newest good checkpoint, or from the start, to the last step.

  Raises:
    StoppedError: by a signal; the same call goes on.
    train.DivergedError: and train.on_divergence is stop, or it has rolled back often enough.
    checkpoint.CheckpointError: a save failed, or no checkpoint can be used.
  """
  c = exp.config
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", policy(c))
  rollbacks = Rollbacks(workdir)
  stopping = distributed.Soon("stop")
  with contextlib.closing(checkpoints), Stop() as stop:
    compiled = None
    # Its step apart: to read it from the state would wait until a new state is drawn, which the
    # devices do while the step is compiled.
    state, start = first_state(exp, checkpoints, rollbacks, workdir)
    while start < exp.steps:
      try:
        with contextlib.ExitStack() as stack:
          log = stack.enter_context(contextlib.closing(_open_log(exp, workdir, start)))
          batches = stack.enter_context(contextlib.closing(_batches(exp, rollbacks, start)))
          placed = sharding.prefetch(batches, exp.mesh)
          first = next(placed)
          compiled = compiled or _compile(exp)
          log.begin()
          state = train.train(
            compiled,
            state,
            itertools.chain([first], placed),
            exp.step_key,
            steps=exp.steps,
            log_every=c.log.every_steps,
            save_when=_save_when(exp),
            stop_when=lambda step: stopping(bool(stop.name)),
            log=_writer(exp, log),
            save=_saver(exp, checkpoints, rollbacks, log, origin.lineage(workdir)),
            most_gradient=c.train.max_gradient_norm or math.inf,
          )
          checkpoints.wait()
      except train.DivergedError as error:
        state, start = _go_back(exp, checkpoints, rollbacks, workdir, error)
        continue
      start = int(state.step)
      if start < exp.steps:
        raise _stopped(stop, start, exp.steps)
    # A signal that came too late for a step to be stopped after it.
    if distributed.any_process(bool(stop.name)):
      raise _stopped(stop, exp.steps, exp.steps)
  return state


def _stopped(stop: Stop, step: int, steps: int) -> StoppedError:
  distributed.barrier("stopped")  # no process ends while another one finishes its save
  return StoppedError(stop.name, f"after step {step:,} of {steps:,}, which is saved")


def policy(c: ConfigDict) -> checkpoint.Policy:
  """Which checkpoints a config keeps."""
  return checkpoint.Policy(
    c.checkpoint.keep, c.checkpoint.keep_every, c.checkpoint.best, c.checkpoint.best_mode
  )


def data_position(exp: Experiment, step: int, skipped: int = 0) -> dict:
  """Where the input stands after a step: a pure function of step, seed, images and rollbacks."""
  return {
    "next_example": (step + skipped) * exp.config.train.batch_size,
    "seed": exp.config.seed,
    "source": exp.train_source.name,
    "images": len(exp.train_source),
    "classes": len(exp.train_source.classes),
  }


def first_state(
  exp: Experiment, checkpoints: checkpoint.Checkpoints, rollbacks: Rollbacks, workdir: Path
) -> tuple[train.TrainState, int]:
  """The newest checkpoint's state, or a new one; and its step."""
  if checkpoints.latest() is None:
    return origin.new_state(exp, workdir), 0
  state = restore(exp, checkpoints, rollbacks)
  step = int(state.step)
  checkpoints.discard_after(step)  # the damaged ones, if there were any
  print(f"going on from step {step:,} of {exp.steps:,}", flush=True)
  return state, step


def restore(
  exp: Experiment, checkpoints: checkpoint.Checkpoints, rollbacks: Rollbacks
) -> train.TrainState:
  """The newest checkpoint, if it was made from the images that there are now.

  Raises:
    ConfigError: it was made from others.
  """
  abstract = exp.abstract_state

  def accept(step: int, found: dict[str, Any]) -> None:
    expected = data_position(exp, step, rollbacks.skipped_before(step))
    changed = [
      f"{name}: {found[name]} -> {expected[name]}"
      for name in found
      if found[name] != expected[name]
    ]
    if changed:
      raise ConfigError(
        f"the checkpoint of step {step} was trained on other images ({'; '.join(changed)}); choose "
        "another --workdir, or bring the images of data.folder back"
      )

  return checkpoints.restore(abstract, accept=accept).state


def _batches(exp: Experiment, rollbacks: Rollbacks, start: int) -> Iterator[Any]:
  """The batches of the steps after `start`, without those that were left out."""
  for first, end in rollbacks.segments(start):
    with contextlib.closing(exp.train_batches(first + rollbacks.skipped(first))) as batches:
      yield from itertools.islice(batches, None if end is None else end - first)


def _open_log(exp: Experiment, workdir: Path, start: int) -> logs.RunLog:
  return logs.RunLog(
    workdir,
    steps=exp.steps,
    steps_per_epoch=exp.steps_per_epoch,
    images_per_step=exp.config.train.batch_size,
    start=start,
    every_seconds=exp.config.log.every_seconds,
    writer=distributed.is_writer(),
    accuracy="online top-1" if exp.config.task == "pretrain" else "top-1",
  )


def _compile(exp: Experiment) -> Callable:
  compiled = exp.compile_step()
  # On CPUs the first exchange between processes fails where one comes 30 s after another.
  distributed.barrier("compiled")
  return compiled


def _writer(exp: Experiment, log: logs.RunLog) -> Callable[[int, dict[str, float]], None]:
  """Writes a row, and warns once when the representation collapses."""
  warned = set()

  def write(step: int, scalars: dict[str, float]) -> None:
    log.write(step, {**scalars, "rate": exp.rate_at(step - 1)})
    size = exp.config.byol.projection_size
    if "std" not in scalars or warned or step <= exp.warmup_steps:
      return
    warning = metrics.collapse_warning(scalars["std"], scalars["rank"], size)
    if warning:
      warned.add(step)
      print(f"warning: step {step}: {warning}", flush=True)

  return write


def _save_when(exp: Experiment) -> Callable[[int], bool]:
  """True for the steps after which a checkpoint is due: by epochs, steps or minutes."""
  c = exp.config.checkpoint
  by_epoch = max(1, round(c.every_epochs * exp.steps_per_epoch))
  last, soon = [time.monotonic()], distributed.Soon("save")  # clocks differ: one wish is for all

  def due(step: int) -> bool:
    now = time.monotonic()
    by_time = c.every_minutes > 0 and soon(now - last[0] >= 60 * c.every_minutes)
    by_step = step % by_epoch == 0 or (c.every_steps > 0 and step % c.every_steps == 0)
    if by_time or by_step:
      last[0] = now
    return by_time or by_step

  return due


def _saver(
  exp: Experiment,
  checkpoints: checkpoint.Checkpoints,
  rollbacks: Rollbacks,
  log: logs.RunLog,
  lineage: dict[str, Any] | None,
) -> Callable[[int, train.TrainState, dict[str, float]], None]:
  def save(step: int, state: train.TrainState, scalars: dict[str, float]) -> None:
    position = data_position(exp, step, rollbacks.skipped_before(step))
    facts = {
      "commit": commit(),
      "config": config.flatten(exp.config),
      "fingerprint": config.fingerprint(exp.config),
      "lineage": lineage,
    }
    blocked = checkpoints.save(step, state, position, facts, scalars)
    log.event(step, "checkpoint_blocked_seconds", blocked)

  return save


def _go_back(
  exp: Experiment,
  checkpoints: checkpoint.Checkpoints,
  rollbacks: Rollbacks,
  workdir: Path,
  error: train.DivergedError,
) -> tuple[train.TrainState, int]:
  """The state to go on from after a divergence, and its step; the batches since will be left out."""
  most = exp.config.train.max_rollbacks
  if exp.config.train.on_divergence == "stop":
    raise error
  if rollbacks.count >= most:
    raise train.DivergedError(
      f"{error} It went back {rollbacks.count} times before; train.max_rollbacks={most}.",
      error.step,
    ) from None
  checkpoints.wait()
  state, to = first_state(exp, checkpoints, rollbacks, workdir)
  rollbacks.add(error.step, to, str(error))
  print(
    f"warning: {error} Going back to step {to:,}; the batches since then are left out"
    f" (rollback {rollbacks.count} of {most})",
    flush=True,
  )
  return state, to


@functools.cache
def commit() -> str:
  """The git commit of this code, with `+` where files are changed; the version where git is not."""
  here = Path(__file__).parent

  def git(*arguments: str) -> str:
    done = subprocess.run(
      ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return f"v{byolx.__version__}"
