"""The one loop: steps until the end, rows for the log, saves, and refusal of divergence."""

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
"""Steps that may be under way at once; each holds a batch on the devices."""


@dataclasses.dataclass(frozen=True)
class TrainSpec:
  """The config group `train`."""

  epochs: float = field(1000.0, "passes over the training images", above(0))
  batch_size: int = field(4096, "images per optimiser step, over all devices", at_least(1))
  micro_batch: int = field(
    0, "images per forward pass, gradients averaged over passes; 0: all", at_least(0)
  )
  remat: str = field(
    "none",
    "what the forward pass keeps for the backward pass, which computes the rest again: none (all), or "
    "outputs of every convolution, block, stage",
    one_of(*KEPT),
    free=True,
  )
  max_gradient_norm: float = field(
    0.0, "a gradient norm above this counts as divergence; 0: only what is not finite", at_least(0)
  )
  on_divergence: str = field(
    "stop",
    "stop, or go back to the last checkpoint and leave out the batches since",
    one_of("stop", "rollback"),
    free=True,
  )
  max_rollbacks: int = field(3, "after so many, a divergence stops the run", at_least(0), free=True)


class DivergedError(RuntimeError):
  """A loss or an update that is not finite, or a gradient beyond its limit, at `step`."""

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
  """Runs from the state's step to `steps`, or to where it is stopped.

  Args:
    step_function: from `compile_step`, as it is or compiled ahead of time.
    state: is donated.
    batches: on the devices already, starting at the state's step.
    key: of whatever a loss draws; folded with the step.
    steps: to stop at.
    log_every: steps between calls of `log`, which is also called at the end.
    save_when: asked after each step whether to save; the last step and one that stops are saved.
    stop_when: asked after each step whether to stop there.
    log: takes a step (1 is the first) and its scalars.
    save: takes a step, its state, which is good, and its scalars.
    most_gradient: a norm of the gradient above this counts as divergence.

  Raises:
    DivergedError: before a state that is not good would be logged or saved.
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
