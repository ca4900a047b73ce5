"""The training loop: runs steps, logs rows, saves checkpoints and detects divergence, for any task."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array

from byolx.core.fields import above, at_least, field, one_of
from byolx.models.remat import KEPT
from byolx.training.state import Scalars, TrainState
from byolx.training.step import StepFunction
from byolx.training.task import Batch

IN_FLIGHT = 2
"""Largest number of steps that wait on the devices at one time; each holds a batch in memory."""


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """The config group `train`: length, batch sizes, rematerialisation, treatment of divergence."""

  epochs: float = field(1000.0, "number of passes over the training images", above(0))
  batch_size: int = field(4096, "images per optimiser step, over all devices", at_least(1))
  micro_batch: int = field(
    0,
    "images per forward pass; gradients are averaged over the passes of a step; 0: all in one pass",
    at_least(0),
  )
  remat: str = field(
    "none",
    "rematerialisation: the backward pass computes again what is not stored; none stores everything; the "
    "others store the outputs of each convolution, block or stage",
    one_of(*KEPT),
    free=True,
  )
  max_gradient_norm: float = field(
    0.0,
    "gradient norm above which training counts as diverged; 0: no limit",
    at_least(0),
  )
  on_divergence: str = field(
    "stop",
    "action after a divergence: stop; or rollback to the last checkpoint, without the batches since it",
    one_of("stop", "rollback"),
    free=True,
  )
  max_rollbacks: int = field(
    3, "number of rollbacks after which a divergence stops the run", at_least(0), free=True
  )


class DivergedError(RuntimeError):
  """Raised if a logged value of a step is not finite, or if the gradient norm exceeds its limit.

  Args:
    message: error message.
    step: number of the step that diverged; the first step is 1.
  """

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


def train(
  step_function: StepFunction,
  state: TrainState,
  batches: Iterator[Batch],
  key: Array,
  *,
  steps: int,
  log_every: int,
  save_when: Callable[[int], bool],
  stop_when: Callable[[int], bool],
  log: Callable[[int, dict[str, float]], None],
  save: Callable[[int, TrainState, dict[str, float]], None],
  most_gradient: float = math.inf,
) -> TrainState:
  """Trains until the step number `steps`, or until `stop_when` returns True.

  Args:
    step_function: train step returned by `step.compile_step`, jitted or compiled ahead of time.
    state: training state to start from; its arrays are donated.
    batches: batches on the devices; the first is used in the step after `state.step`.
    key: random key of the run, from which each step derives the key of its loss.
    steps: number of the last step.
    log_every: number of steps between two log rows; the last step is logged too.
    save_when: function of the step number that returns True if the state must be saved after that
      step. The state is also saved after the last step and after a step that stops the loop.
    stop_when: function of the step number that returns True if the loop must stop after that step.
    log: function that logs a row; it takes the number of the step, from 1, and the step's scalars.
    save: function that saves the state; it takes the number of the step, from 1, the state and the
      step's scalars.
    most_gradient: largest gradient norm that does not count as divergence.

  Returns:
    The state after the last step that ran.

  Raises:
    DivergedError: training diverged; raised before the diverged step is logged or saved.
  """
  pending: list[tuple[int, Scalars]] = []
  for step in range(int(state.step) + 1, steps + 1):
    state, scalars = step_function(state, next(batches), key)
    pending.append((step, scalars))
    if len(pending) > IN_FLIGHT:
      jax.block_until_ready(pending[-1 - IN_FLIGHT][1])
    stops, last = stop_when(step), step == steps
    saves = save_when(step) or stops or last
    if step % log_every == 0 or saves:
      rows = [(at, _floats(values)) for at, values in pending]
      pending.clear()
      for at, row in rows:
        _refuse_diverged(at, row, most_gradient)
        if at % log_every == 0 or at == steps:
          log(at, row)
      if saves:
        save(step, state, rows[-1][1])
    if stops:
      break
  return state


def _floats(scalars: Scalars) -> dict[str, float]:
  return {name: float(np.asarray(value)) for name, value in jax.device_get(scalars).items()}


def _refuse_diverged(step: int, row: dict[str, float], most_gradient: float) -> None:
  bad = [f"{name}={value}" for name, value in row.items() if not math.isfinite(value)]
  expected = "finite numbers"
  if not bad and row["norm_gradient"] > most_gradient:
    bad = [f"norm_gradient={row['norm_gradient']:.4g}"]
    expected = f"at most train.max_gradient_norm={most_gradient}"
  if bad:
    raise DivergedError(
      f"step {step}: {', '.join(bad)}: expected {expected}. The last good checkpoint is kept; try a"
      " lower optim.base_rate or a longer optim.warmup_epochs.",
      step,
    )
