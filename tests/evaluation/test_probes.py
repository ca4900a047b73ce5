"""The protocol around the classifiers: preprocessing, draws of labels, selection, records, table."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits

from byolx.evaluation import probes as evaluation_probes
from byolx.evaluation.logistic_regression import linear_probe
from byolx.evaluation.probes import Examples

KNOWN = {"task": "pretrain", "seed": 3, "step": 70, "config": "abc", "commit": "123"}
RECORD = {
  "task", "protocol", "encoder", "labels", "split", "metric", "value", "interval", "n", "seed",
  "step", "config", "commit",
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
  """700 training and 300 test images as uint8 RGB, all channels alike; labels."""
  x, y = load_digits(return_X_y=True)
  pixels = np.repeat((x * 15).astype(np.uint8), 3, axis=1)
  y = y.astype(np.int32)
  return pixels[:700], y[:700], pixels[700:1000], y[700:1000]


def cosines(a, b):
  return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
    b / np.linalg.norm(b, axis=1, keepdims=True)
  ).T


@pytest.mark.parametrize("rows", [700, 60])
@pytest.mark.parametrize("rule", ["centre", "standardise"])
def test_preprocess_is_a_shift_a_scale_and_a_rotation(digits, rows, rule):
  """Both with more images than dimensions and with fewer, where test images leave their span."""
  train, test = (digits[i].astype(np.float64) for i in (0, 2))
  train = train[:rows]
  x, t = evaluation_probes.preprocess(train.astype(np.float32), test.astype(np.float32), rule)
  train, test = train - train.mean(axis=0), test - train.mean(axis=0)
  if rule == "standardise":
    std = train.std(axis=0)
    train, test = (a[:, std > 0] / std[std > 0] for a in (train, test))
  assert x.dtype == t.dtype == np.float32
  np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
  assert (x.astype(np.float64) ** 2).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(cosines(x, x), cosines(train, train), atol=1e-4)
  # What a channel says twice and three times costs nothing.
  assert x.shape[1] <= min(64, rows)
  if rule == "centre":
    np.testing.assert_allclose(cosines(t, x), cosines(test, train), atol=1e-4)
    covariance = x.T @ x
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3 * rows)
    assert (np.diff(np.diag(covariance)) <= 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(
  hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 8), st.integers(1, 8)),
    elements=st.floats(-100, 100, width=32),
  ),
  st.sampled_from(evaluation_probes.PREPROCESSES),
)
def test_preprocess_of_any_features_is_finite_and_at_most_of_unit_size(features, rule):
  x, t = evaluation_probes.preprocess(features, features[:1], rule)
  assert np.isfinite(x).all()
  assert np.isfinite(t).all()
  assert x.shape[1] == t.shape[1] <= max(features.shape)
  assert (x**2).sum(axis=1).mean() <= 1.001


def test_preprocess_of_collapsed_features_is_zero():
  x, t = evaluation_probes.preprocess(np.full((10, 4), 3.0), np.full((2, 4), 3.0))
  assert not x.any()
  assert not t.any()


def test_preprocess_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="'whiten'; expected one of centre, standardise"):
    evaluation_probes.preprocess(np.ones((2, 2)), np.ones((1, 2)), "whiten")
  with pytest.raises(ValueError, match="not finite"):
    evaluation_probes.preprocess(np.array([[1.0], [np.nan]]), np.ones((1, 1)))


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(-1, 4), min_size=10, max_size=300).filter(lambda y: max(y) >= 0),
  st.floats(0.01, 1.0),
  st.integers(0, 5),
)
def test_draws_are_labelled_disjoint_and_of_the_size_asked_for(labels, fraction, seed):
  labels = np.array(labels, np.int32)
  labelled = int((labels >= 0).sum())
  count = max(round(fraction * labelled), len(set(labels[labels >= 0])))
  draws = evaluation_probes.label_draws(labels, fraction, 3, seed=seed)
  for draw in draws:
    used = np.concatenate([draw.fit, draw.validation]) if draw.retrain else draw.fit
    assert len(set(used)) == len(used) == count
    assert not set(draw.fit) & set(draw.validation)
    assert (labels[draw.fit] >= 0).all()
    assert (labels[draw.validation] >= 0).all()
  assert len(draws) == (1 if count == labelled else 3)


def test_one_per_cent_of_fashion_mnist_is_600_labels():
  labels = np.arange(60_000, dtype=np.int32) % 10
  one, ten, every = (evaluation_probes.label_draws(labels, f, 3, seed=1) for f in (0.01, 0.1, 1.0))
  for small, large in zip(one, ten, strict=True):
    np.testing.assert_array_equal(np.bincount(labels[small.fit]), np.full(10, 60))
    np.testing.assert_array_equal(np.bincount(labels[large.fit]), np.full(10, 600))
    assert set(small.fit) <= set(large.fit)
    np.testing.assert_array_equal(small.validation, every[0].validation)
    assert len(small.validation) == 6000
    assert not small.retrain
  assert len({tuple(draw.fit) for draw in one}) == 3
  other = evaluation_probes.label_draws(labels, 0.01, 3, seed=2)
  assert not {tuple(draw.fit) for draw in one} & {tuple(draw.fit) for draw in other}
  assert [(len(d.fit), len(d.validation), d.retrain) for d in every] == [(54_000, 6000, True)]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_fractions_that_are_none_are_refused(fraction):
  with pytest.raises(ValueError, match="expected 0 < fraction <= 1"):
    evaluation_probes.label_draws(np.zeros(5, np.int32), fraction, 1, seed=0)


@pytest.fixture(scope="module")
def split(digits):
  """60 images to fit, 640 for validation, 300 for the test."""
  train, labels, test, test_labels = digits
  x, t = evaluation_probes.preprocess(train, test)
  return (
    Examples(x[:60], labels[:60]),
    Examples(x[60:], labels[60:]),
    Examples(t, test_labels),
  )


L2 = (1e-3, 0.1, 1e4)


def predicted(probes, i, examples):
  return (examples.features @ probes.kernel[i] + probes.bias[i]).argmax(1).astype(np.int32)


def test_selection_takes_the_best_on_validation_and_reports_on_test(split):
  train, validation, test = split
  score = evaluation_probes.select_and_score(*split, classes=10, l2=L2)
  assert score.l2 in (1e-3, 0.1)  # 1e4 leaves next to nothing of the kernel
  assert score.accuracy > 0.6
  # Whichever classifier the validation labels agree with is chosen; the test labels do not matter.
  probes = linear_probe(*train, L2, classes=10, tolerance=1e-5, max_iterations=100)
  for i, l2 in enumerate(L2):
    agreeing = Examples(validation.features, predicted(probes, i, validation))
    score = evaluation_probes.select_and_score(train, agreeing, test, classes=10, l2=L2)
    assert score.l2 == l2
    assert score.accuracy == pytest.approx((predicted(probes, i, test) == test.labels).mean())
  assert score.at_edge  # 1e4 beats 0.1 by far


def test_selection_among_equals_takes_the_middle(split):
  train, validation, test = split
  unlabelled = Examples(validation.features, np.full(640, -1, np.int32))
  score = evaluation_probes.select_and_score(train, unlabelled, test, classes=10, l2=L2)
  assert (score.l2, score.at_edge) == (0.1, False)


def test_retraining_uses_validation_images_too(split):
  train, validation, test = split
  score = evaluation_probes.select_and_score(*split, classes=10, l2=L2, retrain=True)
  both = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
  expected = linear_probe(*both, [score.l2], classes=10)
  right = predicted(expected, 0, test) == test.labels
  assert score.accuracy == pytest.approx(right.mean(), abs=0.01)
  assert (
    score.accuracy > evaluation_probes.select_and_score(*split, classes=10, l2=L2).accuracy + 0.03
  )


@pytest.fixture(scope="module")
def records(digits):
  train, labels, test, test_labels = digits
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(192, 192)))[0].astype(np.float32)
  features = {
    "online": (train @ turn * 7 + 3, test @ turn * 7 + 3),
    "random": (rng.normal(size=(700, 8)), rng.normal(size=(300, 8))),
    "pixels": (train, test),
  }
  return evaluation_probes.evaluate_features(
    features, labels, test_labels, fractions=(0.1, 1.0), draws=2, l2=(1e-3, 1e-2, 0.1), **KNOWN
  )


def value(records, encoder, protocol, labels):
  (found,) = (
    r["value"]
    for r in records
    if (r["encoder"], r["protocol"], r["labels"]) == (encoder, protocol, labels)
  )
  return found


def test_records_have_every_field_and_can_be_written(records):
  assert len(records) == 3 * 2 * 2
  for record in records:
    assert set(record) == RECORD
    assert {key: record[key] for key in KNOWN} == KNOWN
    assert (record["split"], record["metric"]) == ("test", "top1")
    assert record["n"] == (1 if record["labels"] == 1.0 else 2)
    assert (record["interval"] is None) == (record["n"] == 1)
  assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_values_are_those_of_the_features(records):
  for protocol in ("linear", "knn"):
    assert value(records, "pixels", protocol, 1.0) > 0.9
    assert value(records, "pixels", protocol, 0.1) > 0.8
    assert value(records, "random", protocol, 1.0) < 0.2
    # Turned, shifted and scaled pixels are the same features.
    for labels in (0.1, 1.0):
      pixels = value(records, "pixels", protocol, labels)
      assert value(records, "online", protocol, labels) == pytest.approx(pixels, abs=0.015)


def test_an_edge_of_the_grid_is_reported(digits, caplog, monkeypatch):
  train, labels, test, test_labels = digits

  def score(fit, *_, **__):
    return evaluation_probes.Score(0.5, 1e-5, at_edge=len(fit.labels) < 100)

  monkeypatch.setattr(evaluation_probes, "select_and_score", score)
  with caplog.at_level(logging.INFO, "byolx"):
    evaluation_probes.evaluate_features(
      {"pixels": (train, test)}, labels, test_labels, fractions=(0.1, 1.0), draws=2, **KNOWN
    )
  warning, done = caplog.records
  assert warning.levelno == logging.WARNING
  assert "pixels, 0.1 of the labels: the best l2 is at an edge of 1e-05 to 10" in warning.message
  assert done.message.startswith("probed pixels in")
  assert done.message.endswith("l2 chosen: 1e-05, 1e-05, 1e-05")


def test_without_labels_there_is_nothing_to_measure(digits):
  train, labels, test, test_labels = digits
  features = {"pixels": (train, test)}
  assert evaluation_probes.evaluate_features(features, np.full(700, -1), test_labels, **KNOWN) == []
  assert evaluation_probes.evaluate_features(features, labels, np.full(300, -1), **KNOWN) == []


def record(encoder, protocol, labels, value, interval, **more):
  return {
    **KNOWN, "encoder": encoder, "protocol": protocol, "labels": labels, "split": "test",
    "metric": "top1", "value": value, "interval": interval, "n": 1, **more,
  }  # fmt: skip


RECORDS = [
  record("online", "linear", 0.01, 0.8412, 0.0049),
  record("online", "linear", 1.0, 1.0, None),
  record("online", "knn", 0.01, 0.8, 0.1),
  record("pixels", "linear", 0.01, 0.7, 0.0),
  record("pixels", "knn", 0.01, 0.05, 0.012),
  record("online", "online_probe", 1.0, 0.9, None),
]


def test_table_of_records():
  assert evaluation_probes.format_table(RECORDS).splitlines() == [
    "          linear probe          k-NN          online probe",
    "encoder     1 %         100 %     1 %         100 %",
    "online     84.1 ± 0.5   100.0    80.0 ±10.0    90.0",
    "pixels     70.0 ± 0.0       -     5.0 ± 1.2       -",
    "top-1 accuracy in %, by share of the labels; ± half the range over repeats",
  ]


def test_tables_of_several_steps_are_kept_apart():
  text = evaluation_probes.format_table(RECORDS + [{**r, "step": 90} for r in RECORDS[:1]])
  first, second = text.split("\n\n")
  assert first.splitlines()[0] == "task pretrain, split test, metric top1, step 70, seed 3"
  assert "step 90" in second
  assert "100 %" not in second
  assert evaluation_probes.format_table([]) == ""
