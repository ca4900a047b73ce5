"""Losses against numpy, the reference's own numbers, and what their gradients must look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from byolx.training import losses

regression = jax.jit(losses.regression_loss, static_argnames="guard")
entropy = jax.jit(losses.cross_entropy)


@jax.jit
def mean_gradient(prediction, target):
  """Of the batch's mean loss with respect to the prediction."""
  return jax.grad(lambda q: jnp.mean(losses.regression_loss(q, target)))(prediction)


@pytest.fixture(scope="module")
def vectors():
  """q and z', 32 x 16, of very different lengths."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.uniform(-6, 6, (2, 32, 1)))
  return (rng.normal(size=(2, 32, 16)) * lengths).astype(np.float32)


def cosine(q, z):
  q, z = q.astype(np.float64), z.astype(np.float64)
  return np.sum(q * z, -1) / (np.linalg.norm(q, axis=-1) * np.linalg.norm(z, axis=-1))


def test_value_is_two_minus_two_cosines(vectors):
  q, z = vectors
  np.testing.assert_allclose(regression(q, z), 2 - 2 * cosine(q, z), rtol=1e-5, atol=1e-6)


def test_gradient_of_the_mean_by_hand(vectors):
  q, z = vectors
  length = np.linalg.norm(q, axis=1, keepdims=True)
  unit_q, unit_z = q / length, z / np.linalg.norm(z, axis=1, keepdims=True)
  by_hand = -2 / length * (unit_z - cosine(q, z)[:, None] * unit_q) / len(q)
  np.testing.assert_allclose(mean_gradient(q, z) * length, by_hand * length, rtol=1e-4, atol=1e-7)


def test_the_reference_values_and_gradient(golden):
  archive = golden("optimisation")
  q, z = archive["loss_prediction"], archive["loss_target"]
  np.testing.assert_allclose(regression(q, z), archive["loss_per_example"], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(mean_gradient(q, z), archive["loss_mean_gradient"], atol=1e-6)
  assert np.abs(archive["loss_mean_gradient"]).max() > 1e-2


@pytest.mark.parametrize(
  ("z", "expected"),
  [([3.0, 0.0], 0.0), ([-0.5, 0.0], 4.0), ([0.0, 7.0], 2.0), ([1.0, 1.0], 2 - 2**0.5)],
)
def test_equal_opposite_and_orthogonal_directions(z, expected):
  got = regression(np.array([[2.0, 0.0]], np.float32), np.array([z], np.float32))
  np.testing.assert_allclose(got, [expected], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_lengths_do_not_matter_and_the_range_is_0_to_4(seed, first, second):
  q, z = np.random.default_rng(seed).normal(size=(2, 8, 4)).astype(np.float32)
  loss = regression(q, z)
  np.testing.assert_allclose(
    regression(q * np.float32(first), z * np.float32(second)), loss, atol=2e-5
  )
  assert np.all(loss >= 0)
  assert np.all(loss <= 4 + 1e-5)


def test_rows_below_the_guard_are_scaled_by_a_constant():
  q = np.array([[3e-8, 4e-8, 0.0], [3.0, 4.0, 0.0]], np.float32)  # |q|^2 = 2.5e-15 < 1e-12
  z = np.array([[0.0, 0.0, 2.0]] * 2, np.float32)
  unit = np.array([[0.03, 0.04, 0.0], [0.6, 0.8, 0.0]])  # q * 1e6, q / 5
  np.testing.assert_allclose(regression(q, z), np.sum((unit - [0, 0, 1]) ** 2, 1), rtol=1e-5)
  # A constant factor passes the whole gradient, also along q; a norm removes that part.
  gradient = np.asarray(mean_gradient(q, z))
  np.testing.assert_allclose(gradient[0], (unit[0] - [0, 0, 1]) * 1e6, rtol=1e-5)
  np.testing.assert_allclose(gradient[1] @ q[1], 0, atol=1e-6)


def test_zero_vectors_have_a_finite_loss_and_gradient():
  q, z = np.zeros((2, 4), np.float32), np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
  np.testing.assert_allclose(regression(q, z), [1.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(mean_gradient(q, z), [[-1e6, 0, 0, 0], [0, 0, 0, 0]], rtol=1e-5)


def test_without_a_guard_short_vectors_have_length_one_and_zero_has_none(vectors):
  q, z = vectors
  np.testing.assert_allclose(regression(q, z, guard=0.0), regression(q, z), atol=1e-6)
  short, zero = jnp.full((1, 4), 1e-10), jnp.zeros((1, 4))
  np.testing.assert_allclose(losses.l2_normalise(short, 0.0), [[0.5] * 4], rtol=1e-5)
  assert np.isnan(losses.l2_normalise(zero, 0.0)).all()
  np.testing.assert_array_equal(losses.l2_normalise(zero), zero)


def test_cross_entropy_is_scipys_and_survives_large_logits():
  rng = np.random.default_rng(1)
  logits = (rng.normal(size=(64, 10)) * np.logspace(-2, 4, 64)[:, None]).astype(np.float32)
  labels = rng.integers(0, 10, 64).astype(np.int32)
  expected = -scipy.special.log_softmax(logits.astype(np.float64), axis=1)[np.arange(64), labels]
  np.testing.assert_allclose(entropy(logits, labels), expected, rtol=1e-5, atol=1e-6)


def test_unlabelled_rows_have_no_loss_and_no_gradient():
  logits = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
  labels = np.array([2, -1, 0, -1, 1], np.int32)
  loss, pull = jax.vjp(lambda x: entropy(x, labels), logits)
  gradient = np.asarray(pull(jnp.ones(5))[0])
  softmax = scipy.special.softmax(logits, axis=1)
  for row, label in enumerate(labels):
    if label < 0:
      assert loss[row] == 0
      assert np.all(gradient[row] == 0)
    else:
      np.testing.assert_allclose(loss[row], -np.log(softmax[row, label]), rtol=1e-5)
      np.testing.assert_allclose(gradient[row], softmax[row] - np.eye(3)[label], atol=1e-6)
