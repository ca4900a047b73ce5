"""Schedules against the reference's numbers and the paper's formulas (appendix A)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byolx.training import schedules

PEAK = 0.2 * 4096 / 256


def test_the_reference_rates(golden):
  archive = golden("optimisation")
  rate = schedules.warmup_cosine(PEAK, 10, 1000)
  got = [float(rate(step)) for step in archive["steps"]]
  np.testing.assert_allclose(got, archive["lr"], rtol=1e-6, atol=PEAK * 1e-7)


def test_the_reference_tau(golden):
  archive = golden("optimisation")
  got = np.array([float(schedules.tau(step, 1000, 0.996)) for step in archive["steps"]])
  np.testing.assert_allclose(got, archive["tau"], rtol=1e-6)
  np.testing.assert_allclose(1 - got, 1 - archive["tau"], atol=1e-7)


@pytest.mark.parametrize(
  ("step", "share"),
  [(0, 0.0), (1, 0.1), (9, 0.9), (10, 1.0), (505, 0.5), (1000, 0.0)],
)
def test_warm_up_is_linear_and_the_cosine_ends_at_zero(step, share):
  rate = schedules.warmup_cosine(3.2, 10, 1000)
  np.testing.assert_allclose(float(rate(step)), 3.2 * share, rtol=1e-6, atol=3e-7)


def test_every_step_is_the_formula_under_jit():
  peak, warmup, steps = 0.7, 25, 400
  k = np.arange(steps + 1)
  cosine = peak * (1 + np.cos(np.pi * (k - warmup) / (steps - warmup))) / 2
  expected = np.where(k < warmup, peak * k / warmup, cosine)
  got = jax.jit(jax.vmap(schedules.warmup_cosine(peak, warmup, steps)))(jnp.arange(steps + 1))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
  assert np.argmax(got) == warmup


def test_without_warm_up_the_first_step_has_the_peak():
  rate = schedules.warmup_cosine(0.5, 0, 8)
  expected = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
  np.testing.assert_allclose([float(rate(k)) for k in range(9)], expected, rtol=1e-6, atol=1e-8)


def test_a_rate_stays_at_zero_after_its_last_step():
  assert float(schedules.warmup_cosine(1.0, 5, 50)(60)) == 0.0


@pytest.mark.parametrize("base", [0.0, 0.9, 0.99, 0.996, 0.9995, 1.0])
def test_tau_is_the_papers_formula_under_jit(base):
  steps = 1000
  k = np.arange(steps + 1)
  expected = 1 - (1 - base) * (np.cos(np.pi * k / steps) + 1) / 2
  got = np.asarray(
    jax.jit(jax.vmap(lambda k: schedules.tau(k, steps, base)))(jnp.arange(steps + 1))
  )
  np.testing.assert_allclose(got, expected, atol=2e-7)
  np.testing.assert_allclose(got[[0, 500, -1]], [base, (1 + base) / 2, 1.0], atol=1e-7)
  assert np.all(np.diff(got) >= 0)


def test_a_constant_tau_does_not_move():
  got = jax.jit(jax.vmap(lambda k: schedules.tau(k, 100, 0.25, "constant")))(jnp.arange(101))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, np.full(101, 0.25, np.float32))


def test_a_constant_rate_after_its_warm_up():
  rate = jax.jit(schedules.warmup_constant(0.4, 4))
  np.testing.assert_allclose([rate(k) for k in range(7)], [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
  assert float(schedules.warmup_constant(0.4, 0)(0)) == pytest.approx(0.4)


@pytest.mark.parametrize(
  "schedule",
  [
    schedules.warmup_cosine(PEAK, 10, 1000),
    schedules.warmup_cosine(PEAK, 0, 1000),
    lambda step: schedules.tau(step, 1000, 0.996),
  ],
)
def test_a_program_computes_a_schedule_once_however_often_it_is_used(schedule):
  def step(arrays, k):
    return [schedule(k) * x for x in arrays]

  arrays = [jnp.ones((100 + n, 7)) for n in range(20)]
  compiled = jax.jit(step).lower(arrays, jnp.int32(3)).compile()
  assert compiled.as_text().count(" cosine(") == 1
  np.testing.assert_array_equal(compiled(arrays, jnp.int32(3))[19], schedule(3) * arrays[19])
