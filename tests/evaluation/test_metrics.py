"""Monitors against numpy, scipy and scikit-learn; and what they say of collapsed batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from byolx.evaluation import metrics

normalised_std = jax.jit(metrics.normalised_std)
participation_ratio = jax.jit(metrics.participation_ratio)
effective_rank = jax.jit(metrics.effective_rank)
mean_norm = jax.jit(metrics.mean_norm)
topk_accuracy = jax.jit(metrics.topk_accuracy, static_argnums=2)


def unit(z):
  return z / np.linalg.norm(z, axis=1, keepdims=True)


def batches():
  """Vectors that are not near zero, of two fixed shapes: more images, and more dimensions."""
  return (
    st.sampled_from([(12, 5), (5, 12)])
    .flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-5, 5, width=32)))
    .map(lambda z: z + np.eye(*z.shape, dtype=np.float32) * 0.5 + 0.1)
  )


def axes(k, d):
  """Both directions of k of d axes: k equal eigenvalues."""
  points = np.zeros((2 * k, d), np.float32)
  points[:k, :k], points[k:, :k] = np.eye(k), -np.eye(k)
  return points


@settings(max_examples=30, deadline=None)
@given(batches())
def test_std_equals_numpy(z):
  expected = unit(z.astype(np.float64)).std(axis=0).mean() * np.sqrt(z.shape[1])
  got = float(normalised_std(z))
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert 0 <= got <= 1 + 1e-6


def test_std_is_one_where_directions_fill_the_sphere_and_zero_at_a_point():
  rng = np.random.default_rng(0)
  isotropic = rng.normal(size=(4096, 64)).astype(np.float32)
  assert float(normalised_std(isotropic)) == pytest.approx(1, abs=0.01)
  same = np.tile(isotropic[:1], (4096, 1)) * rng.uniform(0.1, 10, (4096, 1)).astype(np.float32)
  assert float(normalised_std(same)) < 1e-5


def test_std_of_the_warning_is_a_mean_cosine_of_099():
  rng = np.random.default_rng(0)
  d, s = 128, metrics.STD_WARNING
  z = rng.normal(size=(2048, d)) * s / np.sqrt(d)
  z[:, 0] += np.sqrt(1 - s**2)
  assert float(normalised_std(jnp.asarray(z, jnp.float32))) == pytest.approx(s, rel=0.03)
  pairs = unit(z) @ unit(z).T
  assert pairs[~np.eye(len(z), dtype=bool)].mean() == pytest.approx(1 - s**2, abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(batches())
def test_ranks_equal_eigenvalue_formulas(z):
  centred = unit(z.astype(np.float64))
  centred -= centred.mean(axis=0)
  singular = np.linalg.svd(centred, compute_uv=False)
  eigenvalues = np.linalg.eigvalsh(centred.T @ centred / len(z))
  participation = float(participation_ratio(z))
  np.testing.assert_allclose(
    participation, eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rtol=1e-3
  )
  effective = float(effective_rank(z))
  np.testing.assert_allclose(effective, np.exp(stats.entropy(singular)), rtol=1e-3)
  assert 1 - 1e-4 <= participation <= effective + 1e-3
  assert effective <= min(len(z) - 1, z.shape[1]) + 1e-3


@pytest.mark.parametrize(("k", "d"), [(1, 512), (7, 9), (7, 512), (64, 64)])
def test_ranks_count_equal_directions_whatever_the_lengths(k, d):
  lengths = np.random.default_rng(0).uniform(0.01, 100, (2 * k, 1)).astype(np.float32)
  z = axes(k, d) * lengths
  # Turned, so that zeros are not exact zeros: noise must not count as rank.
  turn = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
  z = (z @ turn).astype(np.float32)
  assert float(participation_ratio(z)) == pytest.approx(k, rel=1e-4)
  assert float(effective_rank(z)) == pytest.approx(k, rel=1e-3)


def test_rank_of_vectors_that_are_all_the_same_is_zero():
  for length in (1e-3, 1.0, 1e4):
    z = np.tile(np.random.default_rng(0).normal(size=(1, 96)) * length, (256, 1)).astype(np.float32)
    assert float(participation_ratio(z)) == 0
    assert float(effective_rank(z)) == 0


def test_zero_vectors_and_bfloat16_give_finite_numbers():
  zero = jnp.zeros((8, 4), jnp.bfloat16)
  for monitor in (normalised_std, participation_ratio, effective_rank, mean_norm):
    value = monitor(zero)
    assert value == 0
    assert value.dtype == jnp.float32


def test_monitors_of_a_batch_on_eight_devices():
  z = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32) + 1
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
  for monitor in (normalised_std, participation_ratio, mean_norm):
    np.testing.assert_allclose(monitor(spread), monitor(z), rtol=1e-5)


def test_mean_norm_equals_numpy():
  z = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32) * 3e6
  expected = np.linalg.norm(z.astype(np.float64), axis=1).mean()
  np.testing.assert_allclose(mean_norm(z), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_accuracy_equals_scikit_learn(k):
  rng = np.random.default_rng(k)
  logits = rng.normal(size=(200, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 200).astype(np.int32)
  expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(10))
  assert float(topk_accuracy(logits, labels, k)) == pytest.approx(expected)
  # Unlabelled rows change nothing, whatever their logits.
  more = np.concatenate([logits, rng.normal(size=(56, 10)).astype(np.float32)])
  unlabelled = np.concatenate([labels, np.full(56, -1, np.int32)])
  assert float(topk_accuracy(more, unlabelled, k)) == pytest.approx(expected)


def test_accuracy_of_a_constant_classifier_is_that_of_its_first_classes():
  logits, labels = np.zeros((10, 10), np.float32), np.arange(10, dtype=np.int32)
  assert float(topk_accuracy(logits, labels, 1)) == pytest.approx(0.1)
  assert float(topk_accuracy(logits, labels, 5)) == pytest.approx(0.5)


def test_nan_is_never_right_and_no_labels_is_nan():
  logits = np.zeros((4, 3), np.float32)
  logits[:2] = np.nan
  labels = np.zeros(4, np.int32)
  assert float(topk_accuracy(logits, labels, 1)) == 0.5
  assert float(topk_accuracy(logits, labels, 3)) == 0.5
  assert np.isnan(topk_accuracy(logits, np.full(4, -1, np.int32), 1))


def warning_of(z):
  z = jnp.asarray(z, jnp.float32)
  std, rank = normalised_std(z), participation_ratio(z)
  return metrics.collapse_warning(float(std), float(rank), z.shape[1])


def test_warning_of_healthy_and_collapsed_batches():
  rng = np.random.default_rng(0)
  isotropic = rng.normal(size=(512, 256))
  assert warning_of(isotropic) is None
  # After a ReLU all vectors share a half-space, and that is healthy.
  assert warning_of(np.maximum(isotropic, 0)) is None
  # Ten clusters, one per class: few directions, and that is healthy.
  assert warning_of(isotropic[:10][rng.integers(0, 10, 512)] + 0.1 * isotropic) is None
  constant = isotropic[:1]
  assert "point" in warning_of(constant + 1e-4 * isotropic)
  assert "point" in warning_of(np.tile(constant, (512, 1)))
  assert "line" in warning_of(rng.normal(size=(512, 1)) * constant + 1e-3 * isotropic)


def test_warning_of_numbers_that_are_not_finite_and_of_one_dimension():
  assert "not finite" in metrics.collapse_warning(float("nan"), 3.0, 256)
  assert "not finite" in metrics.collapse_warning(0.5, float("inf"), 256)
  assert metrics.collapse_warning(0.9, 1.0, 1) is None
  assert "\n" not in metrics.collapse_warning(0.01, 1.0, 256)
