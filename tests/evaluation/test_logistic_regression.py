"""Logistic regression against scikit-learn, k-NN against scikit-learn and by hand, on real digits."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from byolx.evaluation import knn, logistic_regression
from byolx.evaluation.knn import knn_probe
from byolx.evaluation.logistic_regression import linear_probe

L2 = (1e-2, 1.0, 100.0)
FIT = functools.partial(linear_probe, l2=L2, classes=10)


@pytest.fixture(scope="module")
def digits():
  """500 training and 400 test images, centred, of mean squared norm 1."""
  x, y = load_digits(return_X_y=True)
  x = x - x[:500].mean(axis=0)
  x = (x / np.sqrt((x[:500] ** 2).sum(axis=1).mean())).astype(np.float32)
  y = y.astype(np.int32)
  return x[:500], y[:500], x[500:900], y[500:900]


def objective(kernel, bias, l2, x, y):
  """E.2's, in float64."""
  logits = x.astype(np.float64) @ kernel + bias
  cross_entropy = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
  return cross_entropy.sum() + l2 / 2 * (kernel.astype(np.float64) ** 2).sum()


def test_objective_and_predictions_equal_scikit_learn(digits):
  x, y, test, _ = digits
  probes = FIT(x, y)
  assert probes.kernel.shape == (3, 64, 10)
  assert probes.converged.all()
  for i, l2 in enumerate(L2):
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    with threadpool_limits(1):  # its threads wait busily for each other where cores are shared
      theirs.fit(x.astype(np.float64), y)
    best = objective(theirs.coef_.T, theirs.intercept_, l2, x, y)
    ours = objective(probes.kernel[i], probes.bias[i], l2, x, y)
    assert best * (1 - 1e-9) <= ours <= best * (1 + 1e-5)
    assert probes.objective[i] == pytest.approx(best, rel=1e-5)
    same = (test @ probes.kernel[i] + probes.bias[i]).argmax(1) == theirs.predict(test)
    assert same.mean() >= 0.995


def test_unlabelled_rows_and_missing_classes_change_nothing(digits):
  x, y, _, _ = digits
  subset = np.flatnonzero(y < 7)
  labels = np.where(y < 7, y, -1)
  some, masked = FIT(x[subset], y[subset]), FIT(x, labels)
  np.testing.assert_allclose(some.objective, masked.objective, rtol=1e-5)
  np.testing.assert_allclose(some.kernel[1:], masked.kernel[1:], atol=0.02)


def test_the_bias_is_not_penalised(digits):
  """With an immense penalty only the bias is left, and it fits the class frequencies."""
  x, y, _, _ = digits
  few = np.arange(500) % 10 >= y  # class c keeps 10 - c tenths of its images
  kernel, bias, *_ = linear_probe(x, np.where(few, y, -1), (1e6, 1e7, 1e8), classes=10)
  shares = np.exp(bias) / np.exp(bias).sum(axis=1, keepdims=True)
  expected = np.bincount(y[few], minlength=10) / few.sum()
  np.testing.assert_allclose(shares, np.tile(expected, (3, 1)), atol=2e-3)
  assert np.abs(kernel).max() < 1e-4


def test_few_iterations_say_that_they_did_not_converge(digits):
  x, y, _, _ = digits
  probes = FIT(x, y, max_iterations=5)
  assert probes.iterations == 5
  assert not probes.converged[0]


def test_separable_features_with_next_to_no_penalty_stay_finite(digits):
  x, y, test, labels = digits
  few = np.where(np.arange(500) < 20, y, -1)
  probes = linear_probe(x, few, (1e-6, 1e-8, 1e-10), classes=10)
  assert np.isfinite(probes.kernel).all()
  right = (x[:20] @ probes.kernel[-1] + probes.bias[-1]).argmax(1) == y[:20]
  assert right.all()
  assert ((test @ probes.kernel[-1] + probes.bias[-1]).argmax(1) == labels).mean() > 0.5


def test_constant_features_leave_the_class_frequencies():
  labels = np.repeat([0, 1], [300, 100]).astype(np.int32)
  _, bias, *_ = FIT(np.zeros((400, 64), np.float32), labels)
  np.testing.assert_allclose(bias[:, 0] - bias[:, 1], np.log(3), atol=1e-2)


@pytest.mark.parametrize(
  ("labels", "l2", "classes", "message"),
  [
    ([-1, -1], (1.0,), 2, "none of the 2 examples is labelled"),
    ([0, 2], (1.0,), 2, "the largest label is 2 of 2 classes"),
    ([0, 0], (1.0,), 1, "at least 2 classes"),
    ([0, 1], (1.0, 0.0), 2, "l2 values are"),
    ([0, 1], (float("nan"),), 2, "l2 values are"),
    ([0, 1], (), 2, "l2 values are"),
  ],
)
def test_what_cannot_be_fitted_is_refused(labels, l2, classes, message):
  with pytest.raises(ValueError, match=message):
    linear_probe(np.ones((2, 3), np.float32), np.array(labels, np.int32), l2, classes=classes)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2_000_000))
def test_padding_wastes_little_and_gives_few_shapes(n):
  rows = logistic_regression._padded_rows(n)
  assert n <= rows <= max(n * 1.125, n + 256)
  assert rows % 256 == 0
  # At most eight sizes between a power of two and the next.
  assert rows <= 4096 or rows % 2 ** (int(np.log2(n)) - 3) == 0


def neighbours_by_hand(x, y, test, k, temperature):
  unit, tests = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, test))
  predicted = []
  for cosines in tests.astype(np.float64) @ unit.T:
    votes = np.zeros(10)
    for i in np.argsort(-cosines)[:k]:
      votes[y[i]] += np.exp(cosines[i] / temperature)
    predicted.append(votes.argmax())
  return np.array(predicted)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (20, 1.0)])
def test_neighbours_equal_those_found_by_hand(digits, k, temperature):
  x, y, test, labels = digits
  got = knn_probe(x, y, test, classes=10, k=k, temperature=temperature)
  expected = neighbours_by_hand(x, y, test, k, temperature)
  assert (got == expected).mean() >= 0.995
  assert (got == labels).mean() > 0.8


def test_neighbours_equal_scikit_learn(digits):
  x, y, test, _ = digits
  theirs = KNeighborsClassifier(
    20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
  ).fit(x, y)
  assert (knn_probe(x, y, test, classes=10) == theirs.predict(test)).mean() >= 0.995


def test_all_images_vote_where_few_are_labelled(digits):
  x, y, test, _ = digits
  got = knn_probe(x[:14], y[:14], test, classes=10)
  np.testing.assert_array_equal(got, neighbours_by_hand(x[:14], y[:14], test, 14, 0.07))
  # Unlabelled images among them have no vote.
  labels = np.where(np.arange(500) < 14, y, -1)
  np.testing.assert_array_equal(knn_probe(x, labels, test, classes=10), got)


def test_blocks_of_any_size_give_the_same_votes(digits, monkeypatch):
  x, y, test, _ = digits
  whole = knn_probe(x, y, test, classes=10)
  monkeypatch.setattr(knn, "_COSINES", 512 * 16)
  np.testing.assert_array_equal(knn_probe(x, y, test, classes=10), whole)


def test_neighbours_without_labels_are_refused():
  with pytest.raises(ValueError, match="none of the 3 examples is labelled"):
    knn_probe(np.ones((3, 2)), np.full(3, -1), np.ones((1, 2)), classes=2)
