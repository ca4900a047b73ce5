"""What frozen features know, beside other encoders and raw pixels: protocols, records, the table.

Everything that one could choose by hand is chosen the same way for every encoder: features are
centred and scaled by one number, and the l2 penalty is the best of a fixed grid on images held out
from training (appendix E.2). The classifiers themselves are in `byolx.evaluation.logistic_regression`.
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
"""For features of mean squared norm 1. E.2 has 45 values from 1e-6 to 1e5, for features as they are."""

PREPROCESSES = ("centre", "standardise")

_NEGLIGIBLE = 1e-6  # variance, relative to the largest, below which float32 sees no direction
_LARGEST_ROTATION = 4096  # eigenvectors of larger matrices cost more than they save
_TITLES = {"linear": "linear probe", "knn": "k-NN", "online_probe": "online probe"}


class Examples(NamedTuple):
  """Features and labels of some images; label -1 = unlabelled, counts for nothing."""

  features: Num[np.ndarray, "n d"]
  labels: Int[np.ndarray, "n"]

  def at(self, indices: Int[np.ndarray, "k"]) -> "Examples":
    return Examples(self.features[indices], self.labels[indices])


class Draw(NamedTuple):
  """Which training images' labels a probe may use; indices, sorted.

  Attributes:
    fit: to train on.
    validation: to choose the l2 value by.
    retrain: train again on both, with the value chosen (E.2).
  """

  fit: Int[np.ndarray, "k"]
  validation: Int[np.ndarray, "v"]
  retrain: bool


class Score(NamedTuple):
  """Top-1 accuracy on the test images, and the l2 value chosen."""

  accuracy: float
  l2: float
  at_edge: bool  # it is the smallest or largest of the grid, and better than the next: go wider


def preprocess(
  train: Num[np.ndarray, "n d"], test: Num[np.ndarray, "m d"], rule: str = "centre"
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Features of all training and test images, as every probe of an encoder gets them.

  Centred by the mean of the training images, divided by one number so that their squared norm is 1
  on average, and rotated to their principal axes. A rotation changes neither probe: |kernel| and
  cosines stay. But L-BFGS takes fewer iterations, and dimensions that say nothing (grey pixels
  repeated three times, dead units) cost nothing.

  Args:
    train, test: real numbers; labels are not used.
    rule: "centre", or "standardise" to divide each dimension by its standard deviation first.

  Returns:
    r <= d dimensions. If r < d, the last is 0 for training images, and for test images the length
    of what lies outside the span of training images.

  Raises:
    ValueError: an unknown rule, or features that are not finite.
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
    std[std <= 1e-6 * std.max()] = np.inf  # a constant dimension says nothing
    train, test = train / std, test / std
  scale = math.sqrt(np.mean(np.sum(train**2, axis=1, dtype=np.float64))) or 1.0
  train, test = _merged(train / scale, test / scale)
  if not train.any() or min(train.shape) > _LARGEST_ROTATION:
    return train, test
  return _rotated(train, test)


def _rotated(
  train: Float32[np.ndarray, "n d"], test: Float32[np.ndarray, "m d"]
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Coordinates along the principal axes of the training images, the longest axis first."""
  n, d = train.shape
  # Both Gram matrices have the same eigenvalues: take the smaller one.
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


def _merged(
  train: Float32[np.ndarray, "n d"], test: Float32[np.ndarray, "m d"]
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Each run of k equal columns (grey pixels, as RGB) as one column times sqrt(k): a rotation too."""
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
  """Seeded, class-balanced draws of a fraction of the training labels; one draw if that is all.

  A fraction counts all labelled training images: 1 % of 60,000 are 600 labels. The same stratified
  share of the images is held out for choosing l2 in every draw, and small fractions are drawn from
  the rest. A fraction that is more than the rest is drawn from all; then the classifier is trained
  on what is not held out to choose l2, and again on the whole draw.

  Raises:
    ValueError: the fraction is outside (0, 1], or no image is labelled.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"the fraction of labels is {fraction}; expected 0 < fraction <= 1")
  labelled = np.flatnonzero(labels >= 0)
  rest, validation = (
    labelled[part] for part in stratified_holdout(labels[labelled], validation_share, seed)
  )
  present = len(np.unique(labels[labelled]))
  count = min(max(round(fraction * len(labelled)), present), len(labelled))
  seeds = range(1000 * seed, 1000 * seed + draws)  # not those of the next run's seed
  if count <= len(rest):
    subsets = (rest[balanced_subset(labels[rest], count, s)] for s in seeds)
    return [Draw(subset, validation, retrain=False) for subset in subsets]
  if count == len(labelled):
    return [Draw(rest, validation, retrain=True)]
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
  """Chooses the l2 value by accuracy on the validation images, then scores the test images.

  Among equally good values it takes the middle one; with no labelled validation image, all are
  equally good. With `retrain`, the classifier that is scored is trained again, with the chosen value,
  on training and validation images together (E.2).

  With the default tolerance and limit, weakly penalised classifiers stop short of their optimum on
  large sets, and take a tenth of the time.
  """
  stop = {"classes": classes, "tolerance": tolerance, "max_iterations": max_iterations}
  probes = linear_probe(*train, l2, **stop)
  accuracies = _accuracies(probes, validation)
  best = np.flatnonzero(accuracies == accuracies.max())
  chosen = int(best[len(best) // 2])
  at_edge = _clearly_at_edge(accuracies, chosen, int(np.sum(validation.labels >= 0)))
  if retrain:
    both = Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
    again = linear_probe(*both, [l2[chosen]], **stop)
    accuracy = _accuracies(again, test)[0]
  else:
    accuracy = _accuracies(probes, test)[chosen]
  return Score(float(accuracy), float(l2[chosen]), at_edge)


def _clearly_at_edge(accuracies: Float[np.ndarray, "l"], chosen: int, images: int) -> bool:
  """Whether an end of the grid beats its neighbour by more than two standard errors."""
  neighbour = {0: 1, len(accuracies) - 1: len(accuracies) - 2}.get(chosen)
  if neighbour is None or len(accuracies) == 1:
    return False
  best = accuracies[chosen]
  error = math.sqrt(best * (1 - best) / max(images, 1))
  return bool(best - accuracies[neighbour] > 2 * error)


def _accuracies(probes: LinearProbes, examples: Examples) -> Float[np.ndarray, "l"]:
  """Top-1 of every classifier on the labelled examples; 0 if there are none."""
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
  """Linear probe and k-NN of every encoder, at every fraction of the labels.

  Args:
    features: of the training and test images, by encoder.
    train_labels, test_labels: -1 = unlabelled.
    fractions, draws: see `label_draws`; a value is the mean over draws, its interval half their
      range (None for one draw).
    task, step, config, commit, split: go into every record as they are.
    seed: of the draws; goes into every record.
    rule: see `preprocess`.
    l2: penalties to choose from.

  Returns:
    One record per encoder, protocol and fraction. Empty if no training or no test image is labelled.
  """
  if not ((train_labels >= 0).any() and (test_labels >= 0).any()):
    return []
  classes = max(2, int(train_labels.max()) + 1)
  plan = {f: label_draws(train_labels, f, draws, seed=seed) for f in fractions}
  known = {"task": task, "split": split, "seed": seed, "step": step}
  known |= {"config": config, "commit": commit}
  records = []
  for encoder, (train_features, test_features) in features.items():
    began = time.monotonic()
    train_features, test_features = preprocess(train_features, test_features, rule)
    train, test = Examples(train_features, train_labels), Examples(test_features, test_labels)
    chosen = []
    for fraction, of_fraction in plan.items():
      scores = [_linear(train, test, draw, classes, l2) for draw in of_fraction]
      votes = [_knn(train, test, draw, classes) for draw in of_fraction]
      chosen += [f"{score.l2:g}" for score in scores]
      if any(score.at_edge for score in scores):
        which, span = f"{encoder}, {fraction:.3g} of the labels", f"{min(l2):g} to {max(l2):g}"
        _log.warning("%s: the best l2 is at an end of %s; go further", which, span)
      for protocol, values in (("linear", [s.accuracy for s in scores]), ("knn", votes)):
        records.append(_record(known, protocol, encoder, fraction, values))
    seconds = time.monotonic() - began
    _log.info("probed %s in %.0f s; l2 chosen: %s", encoder, seconds, ", ".join(chosen))
  return records


def _linear(
  train: Examples, test: Examples, draw: Draw, classes: int, l2: Sequence[float]
) -> Score:
  fit, validation = train.at(draw.fit), train.at(draw.validation)
  return select_and_score(fit, validation, test, classes=classes, l2=l2, retrain=draw.retrain)


def _knn(train: Examples, test: Examples, draw: Draw, classes: int) -> float:
  used = np.union1d(draw.fit, draw.validation) if draw.retrain else draw.fit
  known = test.at(np.flatnonzero(test.labels >= 0))
  predicted = knn_probe(*train.at(used), known.features, classes=classes)
  return float(np.mean(predicted == known.labels))


def _record(
  known: Mapping[str, Any], protocol: str, encoder: str, fraction: float, values: Sequence[float]
) -> dict[str, Any]:
  return {
    "task": known["task"],
    "protocol": protocol,
    "encoder": encoder,
    "labels": fraction,
    "split": known["split"],
    "metric": "top1",
    "value": float(np.mean(values)),
    "interval": float(np.ptp(values) / 2) if len(values) > 1 else None,
    "n": len(values),
    **known,
  }


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Records as a table for a terminal: encoders by protocols and shares of the labels, in %.

  Records of several tasks, splits, metrics, steps or seeds make one table each.
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
  """Lines of one table."""
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
  """A value in %, with room for an interval if others in its column have one."""
  if record is None:
    return "    -"
  interval = record["interval"]
  tail = "" if not spread else " " * 6 if interval is None else f" ±{100 * interval:4.1f}"
  return f"{100 * record['value']:5.1f}{tail}"
