"""BatchNorm against numpy in float64: statistics per view and group, averages, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.core import sharding
from byolx.models.batch_norm import BatchNorm

EPS = 1e-5


@nnx.jit(static_argnames=("train", "views"))
def call(norm, x, train=True, views=1):
  return norm(x, train=train, views=views)


def statistics(x, views, group):
  """Mean and biased variance [g v c] of rows b * views + v, in float64, group after group."""
  x = x.astype(np.float64)
  group = group or len(x) // views
  mean = np.empty((len(x) // (group * views), views, x.shape[-1]))
  var = np.empty_like(mean)
  for g in range(len(mean)):
    block = x[g * group * views : (g + 1) * group * views]
    for v in range(views):
      mean[g, v] = block[v::views].reshape(-1, x.shape[-1]).mean(0)
      var[g, v] = block[v::views].reshape(-1, x.shape[-1]).var(0)
  return mean, var


def normalised(x, views, group):
  mean, var = statistics(x, views, group)
  group = group or len(x) // views
  rows = [(b // (group * views), b % views) for b in range(len(x))]
  spread = (1,) * (x.ndim - 2)
  return np.stack(
    [
      (row - mean[g, v].reshape(*spread, -1)) / np.sqrt(var[g, v].reshape(*spread, -1) + EPS)
      for row, (g, v) in zip(x.astype(np.float64), rows, strict=True)
    ]
  )


def images(seed, *shape):
  """Rows whose mean and spread drift from row to row and channel to channel."""
  rng = np.random.default_rng(seed)
  drift = rng.normal(size=(shape[0], *(1,) * (len(shape) - 2), shape[-1]))
  return (rng.normal(size=shape) * np.exp(drift) + 2 * drift).astype(np.float32)


@pytest.mark.parametrize(
  ("views", "group", "shape"),
  [
    (1, 0, (8, 4)),
    (2, 0, (16, 4)),
    (2, 0, (8, 3, 5, 4)),
    (2, 2, (16, 3, 3, 4)),
    (3, 4, (24, 4)),
    (1, 4, (12, 2, 2, 4)),
  ],
)
def test_each_view_and_group_has_its_own_statistics(views, group, shape):
  norm, x = BatchNorm(shape[-1], group=group), images(0, *shape)
  rng = np.random.default_rng(1)
  scale, offset = rng.normal(size=(2, shape[-1])).astype(np.float32)
  norm.scale.set_value(jnp.asarray(scale))
  norm.offset.set_value(jnp.asarray(offset))
  expected = normalised(x, views, group) * scale + offset
  np.testing.assert_allclose(call(norm, x, views=views), expected, atol=2e-5)
  mean, var = statistics(x, views, group)
  running_mean = running_var = 0.0
  for v in range(views):
    running_mean = 0.9 * running_mean + 0.1 * mean[:, v].mean(0)
    running_var = 0.9 * running_var + 0.1 * var[:, v].mean(0)
  np.testing.assert_allclose(norm.mean[...], running_mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(norm.var[...], running_var, rtol=1e-5, atol=1e-6)
  assert int(norm.updates[...]) == views


def test_one_set_of_statistics_for_both_views_would_be_noticed():
  x = images(2, 16, 4)
  x[1::2] += 3
  apart = call(BatchNorm(4), x, views=2)
  together = call(BatchNorm(4), x, views=1)
  assert np.abs(np.asarray(apart[::2]).mean(0)).max() < 1e-5
  assert np.abs(np.asarray(together[::2]).mean(0)).min() > 0.1


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("decay", [0.9, 0.6])
def test_running_averages_over_several_updates(debias, decay):
  norm = BatchNorm(3, debias=debias, decay=decay)
  hidden_mean, hidden_var = np.zeros(3), np.full(3, 0.0 if debias else 1.0)
  for step in range(4):
    x = images(step, 12, 3)
    call(norm, x, views=2)
    mean, var = statistics(x, 2, 0)
    for v in range(2):
      hidden_mean = decay * hidden_mean + (1 - decay) * mean[0, v]
      hidden_var = decay * hidden_var + (1 - decay) * var[0, v]
    weight = 1 - decay ** (2 * (step + 1)) if debias else 1.0
    got = norm.averages()
    np.testing.assert_allclose(got[0], hidden_mean / weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], hidden_var / weight, rtol=1e-5)
  assert int(norm.updates[...]) == 8
  x = images(9, 5, 3)
  expected = (x - hidden_mean / weight) / np.sqrt(hidden_var / weight + EPS)
  np.testing.assert_allclose(call(norm, x, train=False), expected, rtol=1e-4, atol=1e-5)
  assert int(norm.updates[...]) == 8


def test_one_debiased_update_is_the_batch_itself():
  norm, x = BatchNorm(3), images(0, 6, 3)
  call(norm, x)
  np.testing.assert_allclose(norm.averages()[0], x.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(norm.averages()[1], x.var(0), rtol=1e-5)


@pytest.mark.parametrize("debias", [True, False])
def test_before_any_update_evaluation_leaves_the_input_as_it_is(debias):
  norm, x = BatchNorm(3, debias=debias, scale_init=0.5), images(0, 6, 3)
  np.testing.assert_allclose(call(norm, x, train=False), 0.5 * x / np.sqrt(1 + EPS), rtol=1e-6)
  np.testing.assert_array_equal(norm.mean[...], 0)
  np.testing.assert_array_equal(norm.var[...], 0 if debias else 1)


def test_bfloat16_inputs_have_float32_statistics():
  rng = np.random.default_rng(0)
  x = jnp.asarray(50 + 4 * rng.normal(size=(64, 4, 4, 3)), jnp.bfloat16)
  norm = BatchNorm(3, dtype=jnp.bfloat16)
  out = call(norm, x, views=2)
  exact = np.asarray(x, np.float64)
  mean, var = statistics(exact, 2, 0)
  # bfloat16 sums or squares (8 bits: 2500 +- 16) would miss the variance of 16 altogether.
  np.testing.assert_allclose(norm.mean[...], 0.09 * mean[0, 0] + 0.1 * mean[0, 1], rtol=1e-5)
  np.testing.assert_allclose(norm.var[...], 0.09 * var[0, 0] + 0.1 * var[0, 1], rtol=1e-3)
  assert norm.mean.dtype == norm.var.dtype == norm.scale.dtype == jnp.float32
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float64), normalised(exact, 2, 0), atol=2e-2)


def test_a_constant_channel_with_a_large_mean_has_no_negative_variance():
  # In float32 the mean of squares less the squared mean is 0 give or take 0.1 here.
  x = np.tile(np.random.default_rng(0).uniform(500, 2000, 64).astype(np.float32), (33, 1))
  norm = BatchNorm(64)
  out = np.asarray(call(norm, x))
  assert np.isfinite(out).all()
  assert np.all(norm.var[...] >= 0)


@pytest.mark.parametrize("group", [0, 4])
def test_gradients_against_the_formula_in_float64(group):
  views, channels = 2, 5
  x, pull = images(0, 16, 3, 3, channels), images(1, 16, 3, 3, channels)
  scale = np.linspace(0.5, 2.0, channels)
  norm = BatchNorm(channels, group=group)
  norm.scale.set_value(jnp.asarray(scale, jnp.float32))
  graphdef, params, rest = nnx.split(norm, nnx.Param, ...)

  @jax.jit
  def gradients(params, x):
    def loss(params, x):
      model = nnx.merge(graphdef, params, rest, copy=True)
      return jnp.sum(model(x, train=True, views=views) * pull)

    return jax.grad(loss, argnums=(0, 1))(params, x)

  of_params, of_x = gradients(params, jnp.asarray(x))
  unit, pull = normalised(x, views, group), pull.astype(np.float64)
  std = np.sqrt(statistics(x, views, group)[1] + EPS)
  expected = np.empty_like(unit)
  size = group or 8
  for g in range(8 // size):
    for v in range(views):
      rows = slice(g * size * views + v, (g + 1) * size * views, views)
      p, u = pull[rows], unit[rows]
      centred = p - p.mean((0, 1, 2)) - u * (p * u).mean((0, 1, 2))
      expected[rows] = scale / std[g, v] * centred
  np.testing.assert_allclose(of_x, expected, atol=2e-5 * np.abs(expected).max())
  np.testing.assert_allclose(of_params["scale"][...], (pull * unit).sum((0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(of_params["offset"][...], pull.sum((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
  ("rows", "views", "group"), [(10, 2, 4), (7, 2, 0), (1, 2, 0), (6, 1, 4), (0, 1, 0)]
)
def test_rows_that_cannot_be_cut_evenly_are_refused(rows, views, group):
  norm = BatchNorm(3, group=group)
  with pytest.raises(ValueError, match=rf"batch of {rows} rows: .*multiple of views {views}"):
    norm(jnp.zeros((rows, 3)), train=True, views=views)


def test_statistics_are_global_over_a_mesh():
  x, mesh = images(0, 32, 2, 2, 3), sharding.make_mesh(8)
  x += np.repeat(np.arange(8), 4)[:, None, None, None]  # every device's rows have another mean
  alone, spread = BatchNorm(3), BatchNorm(3)
  expected = call(alone, x, views=2)
  got = call(spread, jax.device_put(x, sharding.by_example(mesh)), views=2)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(spread.mean[...], alone.mean[...], rtol=1e-5)
  np.testing.assert_allclose(spread.var[...], alone.var[...], rtol=1e-5)
