"""Schedules of the learning rate and of the target network's decay rate tau (appendix A)."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

Schedule = Callable[[ArrayLike], Array]


def warmup_cosine(peak: float, warmup_steps: int, steps: int) -> Schedule:
  """Makes a learning rate schedule: a linear warm-up, then a cosine decay to 0 (appendix A).

  Args:
    peak: largest rate, reached at the end of the warm-up.
    warmup_steps: number of steps of the linear rise from 0; 0 for no warm-up.
    steps: number of all steps, warm-up included; the rate is 0 at step `steps`.

  Returns:
    A function of the step, counted from 0.
  """
  if warmup_steps == 0:
    return _once(optax.cosine_decay_schedule(peak, steps))
  return _once(optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps))


def warmup_constant(peak: float, warmup_steps: int) -> Schedule:
  """Makes a learning rate schedule: a linear warm-up, then a constant rate.

  Args:
    peak: rate after the warm-up.
    warmup_steps: number of steps of the linear rise from 0; 0 for no warm-up.

  Returns:
    A function of the step, counted from 0.
  """
  if warmup_steps == 0:
    return optax.constant_schedule(peak)
  return optax.linear_schedule(0.0, peak, warmup_steps)


def tau(step: ArrayLike, steps: int, base: float, rule: str = "cosine") -> Float[Array, ""]:
  """Computes tau, the decay rate of the target network, at one step (appendices A and J.5).

  tau = 1 - (1 - base) * (cos(pi k / K) + 1) / 2, which rises from `base` at k = 0 to 1 at k = K.

  Args:
    step: number k of optimiser steps done before this one, in 0 to K.
    steps: number K of all optimiser steps of the run; tau has no warm-up.
    base: tau at step 0, in [0, 1].
    rule: name of the schedule: "cosine", or "constant" for tau = base at every step (appendix J.1
      has runs with tau = 0).

  Returns:
    float32 scalar in [base, 1].
  """
  if rule == "constant":
    return jnp.float32(base)
  return _once(lambda k: 1.0 - (1.0 - base) * (jnp.cos(jnp.pi * k / steps) + 1.0) / 2.0)(step)


def _once(schedule: Schedule) -> Schedule:
  """Wraps a schedule so that a compiled program computes it only once.

  XLA copies the computation of a scalar into every kernel that uses the scalar. One train step then
  had hundreds of cosines (docs/plan.md, "How long it takes to start"). XLA does not copy a sum of two
  or more numbers. So the value is written as a sum of two numbers, one of which is multiplied by 0.
  """
  return lambda step: jnp.sum(schedule(step + jnp.arange(2)) * jnp.array([1.0, 0.0]))
