"""Measures frozen features by a linear probe and k-NN, at several shares of the labels.

The rules are the same for all encoders. Features are centred and scaled by one number. The l2 penalty is
chosen from a fixed grid on validation images (appendix E.2). The classifiers are in
`byolx.evaluation.logistic_regression` and `byolx.evaluation.knn`.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Num

from byolx.data.splits import balanced_subset, stratified_holdout
from byolx.evaluation.knn import knn_probe
from byolx.evaluation.logistic_regression import LinearProbes, linear_probe

_log = logging.getLogger("byolx")

L2_VALUES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Grid of l2 penalties of the linear probe, for features of mean squared norm 1.

Appendix E.2 has 45 values from 1e-6 to 1e5, for features that are not scaled.
"""

PREPROCESSES = ("centre", "standardise")

_NEGLIGIBLE = 1e-6  # smallest variance, relative to the largest, that is above float32's rounding
_LARGEST_ROTATION = 4096  # eigenvectors of larger matrices take more time than they save
_TITLES = {"linear": "linear probe", "knn": "k-NN", "online_probe": "online probe"}


class Examples(NamedTuple):
  """Features and labels of images.

  Attributes:
    features: features of the images, real numbers, [n, d].
    labels: classes of the images, integers [n]. Images with label -1 are unlabelled and ignored.
  """

  features: Num[np.ndarray, "n d"]
  labels: Int[np.ndarray, "n"]

  def at(self, indices: Int[np.ndarray, "k"]) -> "Examples":
    """Returns the examples with the given indices."""
    return Examples(self.features[indices], self.labels[indices])


class Draw(NamedTuple):
  """A subset of the training images whose labels a probe may use, as sorted indices.

  Attributes:
    fit: indices of the images on which the probe is trained.
    validation: indices of the images on which the l2 penalty is chosen.
    retrain: whether the probe is trained again with the chosen penalty, on the images of `fit` and
      `validation` together (E.2).
  """

  fit: Int[np.ndarray, "k"]
  validation: Int[np.ndarray, "v"]
  retrain: bool


class Score(NamedTuple):
  """Result of a linear probe.

  Attributes:
    accuracy: top-1 accuracy on the test images, in 0..1.
    l2: chosen l2 penalty.
    at_edge: whether the chosen penalty is the smallest or largest of the grid and clearly better than
      the next one. If so, the grid should be extended.
  """

  accuracy: float
  l2: float
  at_edge: bool


def preprocess(
  train: Num[np.ndarray, "n d"], test: Num[np.ndarray, "m d"], rule: str = "centre"
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Centres, scales and rotates the features of an encoder for the probes.

  Subtracts the mean of the training features, divides by one number so that the mean squared norm of the
  training features is 1, and rotates to their principal axes. A rotation does not change the results of
  the probes, which depend on |kernel| and on cosines. It reduces the iterations of L-BFGS, and removes
  dimensions without information (units that are always 0). Before the rotation, equal neighbouring
  dimensions are merged, such as grey pixels in three channels. The rotation is left out if n and d are
  both above `_LARGEST_ROTATION`, because it would take too long.

  Args:
    train: features of all training images, real numbers.
    test: features of all test images, real numbers.
    rule: name of the rule, "centre" or "standardise". "standardise" divides each dimension by its
      standard deviation before the scaling.

  Returns:
    Training and test features, float32, with r <= d dimensions. If the rotation removes dimensions, it
    adds a last one. This is 0 for training images; for test images, it is the length of the component
    that is orthogonal to the span of the training images.

  Raises:
    ValueError: the rule is unknown, or features are not finite.
  """
  if rule not in PREPROCESSES:
    raise ValueError(f"preprocess is {rule!r}; expected one of {', '.join(PREPROCESSES)}")
  train, test = (np.asarray(x, np.float32) for x in (train, test))
  if not (np.isfinite(train).all() and np.isfinite(test).all()):
    raise ValueError("some features are not finite; expected real numbers")
  mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
  train, test = train - mean, test - mean
  if rule == "standardise":
    std = train.std(axis=0)
    std[std <= 1e-6 * std.max()] = np.inf  # sets constant dimensions to 0
    train, test = train / std, test / std
  scale = math.sqrt(np.mean(np.sum(train**2, axis=1, dtype=np.float64))) or 1.0
  train, test = _merge_equal_columns(train / scale, test / scale)
  if not train.any() or min(train.shape) > _LARGEST_ROTATION:
    return train, test
  return _rotate(train, test)


def _rotate(
  train: Float32[np.ndarray, "n d"], test: Float32[np.ndarray, "m d"]
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Returns the coordinates of features along the principal axes of the training features.

  The axes are in the order of decreasing variance. Axes without variance are removed; then a last
  coordinate is added, the length of the component outside the remaining axes (0 for training images).
  """
  n, d = train.shape
  # Both Gram matrices have the same non-zero eigenvalues: take the smaller one.
  values, vectors = np.linalg.eigh(train.T @ train if d <= n else train @ train.T)
  kept = np.flatnonzero(values > _NEGLIGIBLE * values[-1])[::-1]
  axes = vectors[:, kept]
  if d > n:
    axes = train.T @ axes / np.sqrt(values[kept])
  inside = test @ axes
  if len(kept) == d:
    return train @ axes, inside
  outside = np.sum(test**2, axis=1) - np.sum(inside**2, axis=1)
  lengths = np.sqrt(np.maximum(outside, 0))[:, None]
  return np.pad(train @ axes, ((0, 0), (0, 1))), np.concatenate([inside, lengths], axis=1)


def _merge_equal_columns(
  train: Float32[np.ndarray, "n d"], test: Float32[np.ndarray, "m d"]
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Replaces k equal neighbouring columns, such as grey pixels in RGB, by one column times sqrt(k).

  All inner products between rows stay the same, as with a rotation.
  """
  equal = [(x[:, 1:] == x[:, :-1]).all(axis=0) for x in (train, test)]
  first = np.flatnonzero(np.concatenate([[True], ~(equal[0] & equal[1])]))
  weights = np.sqrt(np.diff(first, append=train.shape[1])).astype(np.float32)
  return train[:, first] * weights, test[:, first] * weights


def label_draws(
  labels: Int[np.ndarray, "n"],
  fraction: float,
  draws: int,
  *,
  seed: int,
  validation_share: float = 0.1,
) -> list[Draw]:
  """Draws class-balanced subsets of the training labels.

  A stratified share of the labelled images is held out to choose the l2 penalty. It is the same in all
  draws. A small subset is drawn from the remaining images. A subset that is larger than the remaining
  images is drawn from all labelled images. Then the classifier is trained twice: to choose l2, on the
  images of the subset that are not held out, and finally on the whole subset.

  Args:
    labels: classes of the training images; -1 means unlabelled.
    fraction: size of a subset, as a fraction of all labelled training images, in (0, 1]. A subset has at
      least one image per class.
    draws: number of subsets. If a subset has all labels, only one is returned.
    seed: seed of the subsets and of the held-out images.
    validation_share: fraction of the labelled images to hold out.

  Returns:
    The subsets, each divided into images to train on and images on which the l2 penalty is chosen.

  Raises:
    ValueError: the fraction is outside (0, 1], or no image is labelled.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"the fraction of labels is {fraction}; expected 0 < fraction <= 1")
  labelled = np.flatnonzero(labels >= 0)
  remaining, validation = (
    labelled[indices] for indices in stratified_holdout(labels[labelled], validation_share, seed)
  )
  classes = len(np.unique(labels[labelled]))
  count = min(max(round(fraction * len(labelled)), classes), len(labelled))
  seeds = range(1000 * seed, 1000 * seed + draws)  # distinct for each run's seed
  if count <= len(remaining):
    subsets = (remaining[balanced_subset(labels[remaining], count, s)] for s in seeds)
    return [Draw(subset, validation, retrain=False) for subset in subsets]
  if count == len(labelled):
    return [Draw(remaining, validation, retrain=True)]
  subsets = [labelled[balanced_subset(labels[labelled], count, s)] for s in seeds]
  return [
    Draw(np.setdiff1d(subset, validation), np.intersect1d(subset, validation), retrain=True)
    for subset in subsets
  ]


def select_and_score(
  train: Examples,
  validation: Examples,
  test: Examples,
  *,
  classes: int,
  l2: Sequence[float] = L2_VALUES,
  retrain: bool = False,
  tolerance: float = 1e-5,
  max_iterations: int = 100,
) -> Score:
  """Chooses the l2 penalty by accuracy on the validation images, and measures the test accuracy (E.2).

  Of equally good penalties, the middle one is chosen. Without labelled validation images, all penalties
  are equally good.

  Args:
    train: training images.
    validation: images on which the l2 penalty is chosen.
    test: images on which the accuracy is measured.
    classes: number of classes, at least 2.
    l2: candidate penalties, above 0.
    retrain: whether the classifier is trained again with the chosen penalty, on training and validation
      images together, before the test.
    tolerance: tolerance of `linear_probe`, the relative reduction of the objective at which it stops.
      With the default, weakly penalised classifiers on large sets stop before their optimum, which
      saves time.
    max_iterations: largest number of iterations of `linear_probe`.

  Returns:
    The test accuracy, the chosen penalty, and whether the grid of penalties should be extended.

  Raises:
    ValueError: no training image is labelled, a label is not below `classes`, or a penalty is not above
      0.
  """
  options = {"classes": classes, "tolerance": tolerance, "max_iterations": max_iterations}
  probes = linear_probe(*train, l2, **options)
  accuracies = _accuracies(probes, validation)
  best = np.flatnonzero(accuracies == accuracies.max())
  chosen = int(best[len(best) // 2])
  at_edge = _clearly_at_edge(accuracies, chosen, int(np.sum(validation.labels >= 0)))
  if retrain:
    combined = Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
    retrained = linear_probe(*combined, [l2[chosen]], **options)
    accuracy = _accuracies(retrained, test)[0]
  else:
    accuracy = _accuracies(probes, test)[chosen]
  return Score(float(accuracy), float(l2[chosen]), at_edge)


def _clearly_at_edge(accuracies: Float[np.ndarray, "l"], chosen: int, images: int) -> bool:
  """Returns whether the chosen penalty is at an edge of the grid and clearly better than its neighbour.

  Clearly better means a difference in accuracy above two standard errors of the accuracy.

  Args:
    accuracies: accuracy of each penalty of the grid, in 0..1.
    chosen: index of the chosen penalty.
    images: number of images on which the accuracies were measured.
  """
  neighbour = {0: 1, len(accuracies) - 1: len(accuracies) - 2}.get(chosen)
  if neighbour is None or len(accuracies) == 1:
    return False
  best = accuracies[chosen]
  error = math.sqrt(best * (1 - best) / max(images, 1))
  return bool(best - accuracies[neighbour] > 2 * error)


def _accuracies(probes: LinearProbes, examples: Examples) -> Float[np.ndarray, "l"]:
  """Computes the top-1 accuracy of each classifier on the labelled examples, in 0..1.

  The accuracies are 0 if no example is labelled.
  """
  labelled = examples.at(np.flatnonzero(examples.labels >= 0))
  x = np.asarray(labelled.features, np.float32)
  predicted = [(x @ w + b).argmax(axis=1) for w, b in zip(probes.kernel, probes.bias, strict=True)]
  return np.array([np.sum(p == labelled.labels) for p in predicted]) / max(len(x), 1)


def evaluate_features(
  features: Mapping[str, tuple[Num[np.ndarray, "n _"], Num[np.ndarray, "m _"]]],
  train_labels: Int[np.ndarray, "n"],
  test_labels: Int[np.ndarray, "m"],
  *,
  fractions: Sequence[float] = (0.01, 0.1, 1.0),
  draws: int = 3,
  task: str,
  seed: int,
  step: int,
  config: str,
  commit: str,
  split: str = "test",
  rule: str = "centre",
  l2: Sequence[float] = L2_VALUES,
) -> list[dict[str, Any]]:
  """Evaluates encoders by a linear probe and k-NN at each fraction of the labels.

  Args:
    features: the training features and the test features of each encoder, by its name.
    train_labels: classes of the training images; -1 means unlabelled.
    test_labels: classes of the test images; -1 means unlabelled.
    fractions: fractions of the training labels that the probes use, each in (0, 1].
    draws: number of random subsets of labels per fraction.
    task: name of the task, written to the records.
    seed: seed of the random subsets, also written to the records.
    step: training step of the encoders, written to the records.
    config: fingerprint of the config, written to the records.
    commit: commit of the code, written to the records.
    split: name of the split of the test images, written to the records.
    rule: name of the preprocessing rule, "centre" or "standardise" (see `preprocess`).
    l2: candidate penalties of the linear probe, above 0.

  Returns:
    One record (a dict) per encoder, protocol ("linear" or "knn") and fraction. Its value is the mean
    accuracy over the subsets, in 0..1. Its interval is half the range of the accuracies, or None if
    there is only one subset. The list is empty if no training image or no test image is labelled.

  Raises:
    ValueError: a fraction or the rule is invalid, or features are not finite.
  """
  if not ((train_labels >= 0).any() and (test_labels >= 0).any()):
    return []
  classes = max(2, int(train_labels.max()) + 1)
  draws_of_fraction = {f: label_draws(train_labels, f, draws, seed=seed) for f in fractions}
  common = {"task": task, "split": split, "seed": seed, "step": step}
  common |= {"config": config, "commit": commit}
  records = []
  for encoder, (train_features, test_features) in features.items():
    began = time.monotonic()
    train_features, test_features = preprocess(train_features, test_features, rule)
    train, test = Examples(train_features, train_labels), Examples(test_features, test_labels)
    chosen = []
    for fraction, fraction_draws in draws_of_fraction.items():
      scores = [_linear(train, test, draw, classes, l2) for draw in fraction_draws]
      knn_accuracies = [_knn(train, test, draw, classes) for draw in fraction_draws]
      chosen += [f"{score.l2:g}" for score in scores]
      if any(score.at_edge for score in scores):
        subject, grid = f"{encoder}, {fraction:.3g} of the labels", f"{min(l2):g} to {max(l2):g}"
        _log.warning("%s: the best l2 is at an edge of %s; extend the grid", subject, grid)
      for protocol, values in (("linear", [s.accuracy for s in scores]), ("knn", knn_accuracies)):
        records.append(_record(common, protocol, encoder, fraction, values))
    seconds = time.monotonic() - began
    _log.info("probed %s in %.0f s; l2 chosen: %s", encoder, seconds, ", ".join(chosen))
  return records


def _linear(
  train: Examples, test: Examples, draw: Draw, classes: int, l2: Sequence[float]
) -> Score:
  fit, validation = train.at(draw.fit), train.at(draw.validation)
  return select_and_score(fit, validation, test, classes=classes, l2=l2, retrain=draw.retrain)


def _knn(train: Examples, test: Examples, draw: Draw, classes: int) -> float:
  indices = np.union1d(draw.fit, draw.validation) if draw.retrain else draw.fit
  labelled = test.at(np.flatnonzero(test.labels >= 0))
  predicted = knn_probe(*train.at(indices), labelled.features, classes=classes)
  return float(np.mean(predicted == labelled.labels))


def _record(
  common: Mapping[str, Any], protocol: str, encoder: str, fraction: float, values: Sequence[float]
) -> dict[str, Any]:
  return {
    "task": common["task"],
    "protocol": protocol,
    "encoder": encoder,
    "labels": fraction,
    "split": common["split"],
    "metric": "top1",
    "value": float(np.mean(values)),
    "interval": float(np.ptp(values) / 2) if len(values) > 1 else None,
    "n": len(values),
    **common,
  }


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Formats records of results as text tables of accuracies in %.

  The rows are encoders; the columns are protocols and shares of the labels. There is one table for each
  combination of task, split, metric, step and seed.
  """
  keys = ("task", "split", "metric", "step", "seed")
  groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
  for record in records:
    groups.setdefault(tuple(str(record[key]) for key in keys), []).append(record)
  tables = []
  for values, group in groups.items():
    about = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    heading = [about] if len(groups) > 1 else []
    tables.append("\n".join(heading + _table(group)))
  return "\n\n".join(tables)


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Formats records of one task, split, metric, step and seed as a table with encoders as rows.

  Returns:
    The lines of the table.
  """
  encoders = list(dict.fromkeys(r["encoder"] for r in records))
  lines = ["", "encoder", *encoders]
  margin = max(map(len, lines))
  lines = [line.ljust(margin) for line in lines]
  for protocol in dict.fromkeys(r["protocol"] for r in records):
    of_protocol = [r for r in records if r["protocol"] == protocol]
    block = [""] * (len(encoders) + 1)
    for labels in sorted({r["labels"] for r in of_protocol}):
      column = {r["encoder"]: r for r in of_protocol if r["labels"] == labels}
      spread = any(r["interval"] is not None for r in column.values())
      cells = [_cell(column.get(encoder), spread) for encoder in encoders]
      head = f"{100 * labels:g} %".rjust(5)
      width = max(map(len, [head, *cells]))
      block = [a + "   " + b.ljust(width) for a, b in zip(block, [head, *cells], strict=True)]
    title = "   " + _TITLES.get(protocol, protocol)
    block = [title, *block]
    width = max(map(len, block))
    lines = [a + b.ljust(width) for a, b in zip(lines, block, strict=True)]
  metric = {"top1": "top-1 accuracy"}.get(records[0]["metric"], records[0]["metric"])
  caption = f"{metric} in %, by share of the labels"
  if any(r["interval"] is not None for r in records):
    caption += "; ± half the range over repeats"
  return [*(line.rstrip() for line in lines), caption]


def _cell(record: Mapping[str, Any] | None, spread: bool) -> str:
  """Returns the text of a record's value in %, with its interval if it has one.

  If `spread` is True, other cells of the column have intervals, and the text is padded to their width.
  """
  if record is None:
    return "    -"
  interval = record["interval"]
  tail = "" if not spread else " " * 6 if interval is None else f" ±{100 * interval:4.1f}"
  return f"{100 * record['value']:5.1f}{tail}"
