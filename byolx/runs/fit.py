"""Trains in a workdir (output folder of a run), with checkpoints, stops, restarts and rollbacks.

A run resumes from its newest good checkpoint and continues exactly as it would have without a stop.
The state is restored bit for bit, and each batch is a function of the step. Rows of `metrics.jsonl`
after the checkpoint are dropped and written again.

After SIGTERM or Ctrl-C, the current step is finished and saved, and `StoppedError` is raised.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from byolx.checkpoints import manager
from byolx.core import distributed, sharding
from byolx.core.config import ConfigError
from byolx.core.signals import Stop, StoppedError
from byolx.runs import config, initial_state, metrics_log
from byolx.runs.experiment import Experiment
from byolx.runs.rollbacks import Rollbacks
from byolx.runs.workdir import commit
from byolx.training import loop
from byolx.training.state import TrainState


def fit(exp: Experiment, workdir: Path) -> TrainState:
  """Trains from the newest good checkpoint, or from step 0 if there is none, to the last step.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    workdir: folder of the run.

  Returns:
    The state after the last step.

  Raises:
    StoppedError: a signal stopped the run; the same call resumes it.
    loop.DivergedError: training diverged, and train.on_divergence is "stop" or train.max_rollbacks
      is reached.
    storage.CheckpointError: a save failed, or no checkpoint can be restored.
    ConfigError: the checkpoint was trained on other images.
  """
  c = exp.config
  checkpoints = manager.Checkpoints(workdir / "checkpoints", policy(c))
  rollbacks = Rollbacks(workdir)
  stopping = distributed.Soon("stop")
  with contextlib.closing(checkpoints), Stop() as stop:
    compiled = None
    # `start` is returned apart: reading state.step would wait until the devices have computed a new
    # state, which they do while the step is compiled.
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
          state = loop.train(
            compiled,
            state,
            itertools.chain([first], placed),
            exp.step_key,
            steps=exp.steps,
            log_every=c.log.every_steps,
            save_when=_save_when(exp),
            stop_when=lambda step: stopping(bool(stop.name)),
            log=_writer(exp, log),
            save=_saver(exp, checkpoints, rollbacks, log, initial_state.lineage(workdir)),
            most_gradient=c.train.max_gradient_norm or math.inf,
          )
          checkpoints.wait()
      except loop.DivergedError as error:
        state, start = _go_back(exp, checkpoints, rollbacks, workdir, error)
        continue
      start = int(state.step)
      if start < exp.steps:
        raise _stopped(stop, start, exp.steps)
    # A signal during the last steps, too late to stop training.
    if distributed.any_process(bool(stop.name)):
      raise _stopped(stop, exp.steps, exp.steps)
  return state


def _stopped(stop: Stop, step: int, steps: int) -> StoppedError:
  distributed.barrier("stopped")  # no process exits while another one still saves
  return StoppedError(stop.name, f"after step {step:,} of {steps:,}, which is saved")


def policy(c: ConfigDict) -> manager.Policy:
  """Returns the rules by which the checkpoints of a run are saved and kept.

  Args:
    c: config of the run, with all fields.
  """
  return manager.Policy(**c.checkpoint)


def data_position(exp: Experiment, step: int, skipped: int = 0) -> dict:
  """Returns the position in the training data after a step. The checkpoint of this step stores it.

  The position is the number of the next training example, with the seed and facts about the data set. It
  depends only on step, seed, images and rollbacks (returns to an earlier checkpoint).

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    step: number of optimiser steps taken.
    skipped: number of batches that earlier rollbacks have left out.
  """
  return {
    "next_example": (step + skipped) * exp.config.train.batch_size,
    "seed": exp.config.seed,
    "source": exp.train_source.name,
    "images": len(exp.train_source),
    "classes": len(exp.train_source.classes),
  }


def first_state(
  exp: Experiment, checkpoints: manager.Checkpoints, rollbacks: Rollbacks, workdir: Path
) -> tuple[TrainState, int]:
  """Returns the state from which training starts or continues, and the step of this state.

  This is the state of the newest good checkpoint. If there is no checkpoint, it is a new state.
  """
  if checkpoints.latest() is None:
    return initial_state.new_state(exp, workdir), 0
  state = restore(exp, checkpoints, rollbacks)
  step = int(state.step)
  checkpoints.discard_after(step)  # damaged checkpoints
  print(f"going on from step {step:,} of {exp.steps:,}", flush=True)
  return state, step


def restore(exp: Experiment, checkpoints: manager.Checkpoints, rollbacks: Rollbacks) -> TrainState:
  """Restores the state of the newest good checkpoint.

  Raises:
    ConfigError: the checkpoint was trained on other images than the experiment has.
    storage.CheckpointError: no checkpoint can be restored.
  """
  abstract = exp.abstract_state

  def accept(step: int, position: dict[str, Any]) -> None:
    expected = data_position(exp, step, rollbacks.skipped_before(step))
    changed = [
      f"{name}: {position[name]} -> {expected[name]}"
      for name in position
      if position[name] != expected[name]
    ]
    if changed:
      raise ConfigError(
        f"the checkpoint of step {step} was trained on other images ({'; '.join(changed)}); choose "
        "another --workdir, or bring the images of data.folder back"
      )

  return checkpoints.restore(abstract, accept=accept).state


def _batches(exp: Experiment, rollbacks: Rollbacks, start: int) -> Iterator[Any]:
  """Yields the training batches of the steps after `start`, except those that rollbacks leave out.

  A rollback returns to an earlier checkpoint after a divergence. It leaves out the batches between the
  checkpoint and the divergence.
  """
  for first, end in rollbacks.segments(start):
    with contextlib.closing(exp.train_batches(first + rollbacks.skipped(first))) as batches:
      yield from itertools.islice(batches, None if end is None else end - first)


def _open_log(exp: Experiment, workdir: Path, start: int) -> metrics_log.RunLog:
  return metrics_log.RunLog(
    workdir,
    steps=exp.steps,
    steps_per_epoch=exp.steps_per_epoch,
    images_per_step=exp.config.train.batch_size,
    start=start,
    every_seconds=exp.config.log.every_seconds,
    writer=distributed.is_writer(),
    accuracy=exp.task.accuracy,
  )


def _compile(exp: Experiment) -> Callable:
  compiled = exp.compile_step()
  # On CPUs the first exchange fails if one process enters it 30 s after another.
  distributed.barrier("compiled")
  return compiled


def _writer(exp: Experiment, log: metrics_log.RunLog) -> Callable[[int, dict[str, float]], None]:
  """Returns a function that writes the scalars of a step to the log.

  The function also prints the first warning of the task after the warm-up, such as one about collapse.
  """
  warned = set()

  def write(step: int, scalars: dict[str, float]) -> None:
    log.write(step, {**scalars, "rate": exp.rate_at(step - 1)})
    if warned or step <= exp.warmup_steps:
      return
    if warning := exp.task.warning(scalars):
      warned.add(step)
      print(f"warning: step {step}: {warning}", flush=True)

  return write


def _save_when(exp: Experiment) -> Callable[[int], bool]:
  """Returns a function that takes a step and returns whether a checkpoint must be saved after it.

  A checkpoint is due by epochs, steps or minutes, as the config group `checkpoint` sets.
  """
  c = exp.config.checkpoint
  by_epoch = max(1, round(c.every_epochs * exp.steps_per_epoch))
  # Clocks differ between processes: the first process whose time is up requests the save of all.
  last, soon = [time.monotonic()], distributed.Soon("save")

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
  checkpoints: manager.Checkpoints,
  rollbacks: Rollbacks,
  log: metrics_log.RunLog,
  lineage: dict[str, Any] | None,
) -> Callable[[int, TrainState, dict[str, float]], None]:
  def save(step: int, state: TrainState, scalars: dict[str, float]) -> None:
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
  checkpoints: manager.Checkpoints,
  rollbacks: Rollbacks,
  workdir: Path,
  error: loop.DivergedError,
) -> tuple[TrainState, int]:
  """Goes back to the newest checkpoint after training diverged.

  The batches between the checkpoint and the divergence are left out when training continues.

  Args:
    exp: the experiment: networks, task, optimiser, devices and images of the run.
    checkpoints: checkpoints of the run.
    rollbacks: earlier returns of the run to a checkpoint. The new one is added.
    workdir: folder of the run.
    error: error that describes the divergence.

  Returns:
    The restored state and its step.

  Raises:
    loop.DivergedError: train.on_divergence is "stop", or train.max_rollbacks is reached.
  """
  most = exp.config.train.max_rollbacks
  if exp.config.train.on_divergence == "stop":
    raise error
  if rollbacks.count >= most:
    raise loop.DivergedError(
      f"{error} The run was rolled back {rollbacks.count} times before; train.max_rollbacks={most}.",
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
