"""Schedules over optimiser steps: the learning rate and the target network's tau (appendix A)."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

Schedule = Callable[[ArrayLike], Array]


def warmup_cosine(peak: float, warmup_steps: int, steps: int) -> Schedule:
  """Linear from 0 to `peak` over `warmup_steps`, then a cosine to 0 at `steps`, without restarts."""
  if warmup_steps == 0:
    return _once(optax.cosine_decay_schedule(peak, steps))
  return _once(optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps))


def warmup_constant(peak: float, warmup_steps: int) -> Schedule:
  """Linear from 0 to `peak` over `warmup_steps`, then `peak`."""
  if warmup_steps == 0:
    return optax.constant_schedule(peak)
  return optax.linear_schedule(0.0, peak, warmup_steps)


def tau(step: ArrayLike, steps: int, base: float, rule: str = "cosine") -> Float[Array, ""]:
  """tau = 1 - (1 - base) * (cos(pi k / K) + 1) / 2: from `base` at k = 0 to 1 at k = K.

  Args:
    step: k, counted before the optimiser's update.
    steps: K, all optimiser steps of the run; there is no warm-up.
    base: tau at step 0, in [0, 1].
    rule: "cosine", or "constant" for base throughout (appendix J.1 runs with tau = 0).
  """
  if rule == "constant":
    return jnp.float32(base)
  return _once(lambda k: 1.0 - (1.0 - base) * (jnp.cos(jnp.pi * k / steps) + 1.0) / 2.0)(step)


def _once(schedule: Schedule) -> Schedule:
  """The same schedule of one step, computed in one place of a program.

  XLA repeats what makes a scalar in every kernel that uses it: 507 cosines in a ResNet-50's step on a
  CPU, and a fifth of its instructions. A sum it does not repeat, if there is more than one number.
  """
  return lambda step: jnp.sum(schedule(step + jnp.arange(2)) * jnp.array([1.0, 0.0]))
