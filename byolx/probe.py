"""What frozen features know: multinomial logistic regression by L-BFGS (appendix E.2), and k-NN.

These are solves, not training: features come in as arrays, accuracies come out. Everything that a
probe could choose by hand is chosen the same way for every encoder: features are centred and scaled
by one number, and the l2 penalty is the best of a fixed grid on images held out from training.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from byolx.data.splits import balanced_subset, stratified_holdout

_log = logging.getLogger("byolx")

L2_VALUES = tuple(float(l2) for l2 in np.logspace(-5, 2, 8))
"""For features of mean squared norm 1. E.2 has 45 values from 1e-6 to 1e5, for features as they are."""

PREPROCESSES = ("centre", "standardise")

_MEMORY = 10  # pairs of steps and gradient changes that L-BFGS keeps
_CURVATURE = 0.02  # a typical p (1 - p) at the optimum; any value gives the same optimum
_NEGLIGIBLE = 1e-6  # variance, relative to the largest, below which float32 sees no direction
_LARGEST_ROTATION = 4096  # eigenvectors of larger matrices cost more than they save
_ROWS, _COLUMNS = 2048, 128  # features are padded to multiples of these
_COSINES = 2**25  # between test and training images, held at a time: 128 MiB
_BLOCK = 512  # test images classified at a time, at most
_TITLES = {"linear": "linear probe", "knn": "k-NN", "online_probe": "online probe"}


class LinearProbes(NamedTuple):
  """One classifier per l2 value, as `linear_probe` found them; logits are x @ kernel + bias.

  Attributes:
    objective: sum of cross-entropies + l2/2 * |kernel|^2, reached.
    converged: whether another step would gain next to nothing.
    iterations: evaluations of all objectives together.
  """

  kernel: Float32[np.ndarray, "l d classes"]
  bias: Float32[np.ndarray, "l classes"]
  objective: Float32[np.ndarray, "l"]
  converged: Bool[np.ndarray, "l"]
  iterations: int


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
  at_edge: bool  # the value is the smallest or largest of the grid: a wider one may be better


def linear_probe(
  features: Num[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  l2: Sequence[float] = L2_VALUES,
  *,
  classes: int,
  tolerance: float = 1e-7,
  max_iterations: int = 1000,
) -> LinearProbes:
  """Multinomial logistic regression for every l2 value at once, by L-BFGS (appendix E.2).

  Minimises sum of cross-entropies + l2/2 * |kernel|^2; the bias is not penalised. That is
  scikit-learn's `LogisticRegression(C=1 / l2)`.

  Args:
    features: as they are; centred and rotated by `preprocess` they take fewer iterations.
    labels: class of each row, -1 = ignore the row.
    l2: penalties, above 0.
    classes: how many there are, at least 2.
    tolerance: stop where the step that comes next promises a smaller share of the objective. float32
      resolves about 1e-7, and stalls below.
    max_iterations: stop there at the latest, see `LinearProbes.converged`.

  Raises:
    ValueError: no label, a label that is not below `classes`, or an l2 that is not above 0.
  """
  _check_labels(labels, classes)
  if not l2 or not all(value > 0 and math.isfinite(value) for value in l2):
    raise ValueError(f"the l2 values are {list(l2)}; expected one or more finite numbers above 0")
  d = features.shape[1]
  x, y = _padded(features, labels)
  found = _fit(x, y, np.asarray(l2, np.float32), classes, tolerance, max_iterations)
  kernel, bias, objective, converged, iterations = jax.device_get(found)
  return LinearProbes(kernel[:, :d], bias, objective, converged, int(iterations))


@functools.partial(jax.jit, static_argnames="classes")
def _fit(
  x: Float32[Array, "n d"],
  labels: Int[Array, "n"],
  l2: Float32[Array, "l"],
  classes: int,
  tolerance: float,
  max_iterations: int,
):
  """`linear_probe` on padded arrays: kernel, bias, objective, converged, iterations."""
  counted = (labels >= 0).astype(x.dtype)
  is_label = (labels[:, None] == jnp.arange(classes))[:, None]
  # Parameters are [l, d + 1, classes]: the rows of the kernel, then the bias.
  penalty = jnp.concatenate([jnp.tile(l2[:, None], (1, x.shape[1])), jnp.zeros((len(l2), 1))], 1)
  second_moments = jnp.append(counted @ x**2, counted.sum())
  # In these units the Hessian is near the identity, which is where L-BFGS starts from.
  units = 1 / jnp.sqrt(_CURVATURE * second_moments + penalty + 1e-12)[:, :, None]

  def objectives(scaled: Float32[Array, "l d+1 classes"]) -> Float32[Array, "l"]:
    w = scaled * units
    logits = jnp.einsum("nd,ldk->nlk", x, w[:, :-1], precision="highest") + w[:, -1]
    own = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    # log sum_j exp(z_j) - z_y, but exact to float32 also where it is nearly 0.
    cross_entropy = jax.nn.softplus(others - own)
    return counted @ cross_entropy + 0.5 * jnp.sum(penalty[:, :, None] * w**2, axis=(1, 2))

  start = jnp.zeros((len(l2), x.shape[1] + 1, classes), x.dtype)
  end = _minimise(objectives, start, tolerance, max_iterations)
  w = end.point * units
  return w[:, :-1], w[:, -1], end.value, ~end.going, end.iterations


class _Search(NamedTuple):
  """L-BFGS on l objectives side by side. The next point tried is point - length * direction."""

  point: Float32[Array, "l a b"]
  value: Float32[Array, "l"]
  direction: Float32[Array, "l a b"]
  slope: Float32[Array, "l"]  # gradient . direction: what a unit step promises, times 2
  length: Float32[Array, "l"]
  memory: optax.OptState
  going: Bool[Array, "l"]
  iterations: Int[Array, ""]


def _minimise(
  objectives: Callable[[Float32[Array, "l a b"]], Float32[Array, "l"]],
  start: Float32[Array, "l a b"],
  tolerance: float,
  max_iterations: int,
) -> _Search:
  """Minimises l independent convex objectives at once, by L-BFGS with backtracking.

  One loop, and one evaluation of all objectives each time round: each objective either takes its
  step or halves it. (`jax.vmap` of `optax.lbfgs` runs both branches of every conditional of its line
  search, and each search until the last objective is content: ten times slower on the same task.)
  """
  lbfgs = optax.scale_by_lbfgs(_MEMORY)
  n = len(start)

  def dot(a, b):
    return jnp.sum(a * b, axis=(1, 2))

  def body(s: _Search) -> _Search:
    trial = s.point - s.length[:, None, None] * s.direction
    value, pullback = jax.vjp(objectives, trial)
    (gradient,) = pullback(jnp.ones(n))
    # Enough is gained, or float32 cannot tell.
    enough = value <= s.value - 1e-4 * s.length * s.slope + 1e-7 * jnp.abs(s.value)
    take = s.going & enough
    direction, memory = jax.vmap(lbfgs.update)(gradient, s.memory, trial)
    slope = dot(gradient, direction)
    point, value, direction, slope, memory = jax.tree.map(
      lambda new, old: jnp.where(take.reshape((n,) + (1,) * (new.ndim - 1)), new, old),
      (trial, value, direction, slope, memory),
      (s.point, s.value, s.direction, s.slope, s.memory),
    )
    length = jnp.where(take, 1.0, s.length / 2)
    going = s.going & (slope > tolerance * jnp.abs(value)) & (length > 1e-4)
    return _Search(point, value, direction, slope, length, memory, going, s.iterations + 1)

  # The first time round tries the start itself, and anything is better than infinity.
  first = _Search(
    point=start,
    value=jnp.full(n, jnp.inf),
    direction=jnp.zeros_like(start),
    slope=jnp.zeros(n),
    length=jnp.ones(n),
    memory=jax.vmap(lbfgs.init)(start),
    going=jnp.ones(n, bool),
    iterations=jnp.zeros((), jnp.int32),
  )
  return jax.lax.while_loop(
    lambda s: (s.iterations < max_iterations) & jnp.any(s.going), body, first
  )


def select_and_score(
  train: Examples,
  validation: Examples,
  test: Examples,
  *,
  classes: int,
  l2: Sequence[float] = L2_VALUES,
  retrain: bool = False,
  tolerance: float = 1e-6,
  max_iterations: int = 150,
) -> Score:
  """Chooses the l2 value by accuracy on the validation images, then scores the test images.

  Among equally good values it takes the middle one; with no labelled validation image, all are
  equally good. With `retrain`, the classifier that is scored is trained again, with the chosen value,
  on training and validation images together (E.2).

  The loose tolerance and the limit leave nearly unregularised classifiers of large sets short of
  their optimum, by under 1 % of the objective where raw pixels of Fashion-MNIST are fitted.
  """
  stop = {"classes": classes, "tolerance": tolerance, "max_iterations": max_iterations}
  probes = linear_probe(*train, l2, **stop)
  accuracies = _accuracies(probes, validation)
  best = np.flatnonzero(accuracies == accuracies.max())
  chosen = int(best[len(best) // 2])
  if retrain:
    both = Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
    again = linear_probe(*both, [l2[chosen]], **stop)
    accuracy = _accuracies(again, test)[0]
  else:
    accuracy = _accuracies(probes, test)[chosen]
  return Score(float(accuracy), float(l2[chosen]), len(l2) > 1 and chosen in (0, len(l2) - 1))


def _accuracies(probes: LinearProbes, examples: Examples) -> Float[np.ndarray, "l"]:
  """Top-1 of every classifier on the labelled examples; 0 if there are none."""
  labelled = examples.at(np.flatnonzero(examples.labels >= 0))
  x = np.asarray(labelled.features, np.float32)
  predicted = [(x @ w + b).argmax(axis=1) for w, b in zip(probes.kernel, probes.bias, strict=True)]
  return np.array([np.sum(p == labelled.labels) for p in predicted]) / max(len(x), 1)


def knn_probe(
  train: Examples,
  test_features: Num[np.ndarray, "m d"],
  *,
  classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> Int[np.ndarray, "m"]:
  """Classes of the test images, by a vote of their k nearest labelled neighbours.

  Near is a large cosine s, and a neighbour's vote weighs exp(s / temperature) (Wu et al. 2018,
  section 3.4). Where fewer than k images are labelled, all of them vote.

  Raises:
    ValueError: no label, or a label that is not below `classes`.
  """
  _check_labels(train.labels, classes)
  x, labels = _padded(*train)
  tests, _ = _padded(test_features, np.zeros(len(test_features), np.int32))
  # In blocks, so that 60,000 x 10,000 cosines are never held at once. Rows are a multiple of _BLOCK.
  block = min(_BLOCK, 2 ** max(0, int(math.log2(_COSINES / len(x)))))
  blocks = tests.reshape(-1, block, tests.shape[1])
  votes = _vote(x, labels, blocks, classes, k, temperature)
  return np.asarray(votes).reshape(-1)[: len(test_features)]


@functools.partial(jax.jit, static_argnames=("classes", "k"))
def _vote(
  x: Float32[Array, "n d"],
  labels: Int[Array, "n"],
  blocks: Float32[Array, "blocks m d"],
  classes: int,
  k: int,
  temperature: float,
) -> Int[Array, "blocks m"]:
  x = _unit(x)

  def of_block(tests: Float32[Array, "m d"]) -> Int[Array, "m"]:
    cosines = jnp.matmul(_unit(tests), x.T, precision="highest")
    nearest, index = jax.lax.top_k(jnp.where(labels >= 0, cosines, -jnp.inf), min(k, len(x)))
    weights = jnp.exp(nearest / temperature)  # 0 for an unlabelled neighbour
    voted = jax.nn.one_hot(labels[index], classes) * weights[:, :, None]
    return jnp.argmax(voted.sum(axis=1), axis=1)

  return jax.lax.map(of_block, blocks)


def _unit(x: Float32[Array, "n d"]) -> Float32[Array, "n d"]:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


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
    r <= d + 1 dimensions. The last is 0 for training images, and holds the length of what lies
    outside their span for test images.

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
    std[std < 1e-6 * std.max(initial=0)] = np.inf  # a constant dimension says nothing
    train, test = train / np.where(std == 0, 1, std), test / np.where(std == 0, 1, std)
  scale = math.sqrt(np.mean(np.sum(train**2, axis=1, dtype=np.float64)))
  if scale == 0 or min(train.shape) > _LARGEST_ROTATION:
    return train / (scale or 1), test / (scale or 1)
  return _rotated(train / scale, test / scale)


def _rotated(
  train: Float32[np.ndarray, "n d"], test: Float32[np.ndarray, "m d"]
) -> tuple[Float32[np.ndarray, "n r"], Float32[np.ndarray, "m r"]]:
  """Principal axes of the training images, the longest first, without those of length 0."""
  n, d = train.shape
  # Both Gram matrices have the same eigenvalues: take the smaller one.
  values, vectors = np.linalg.eigh(train.T @ train if d <= n else train @ train.T)
  kept = np.flatnonzero(values > _NEGLIGIBLE * values[-1])[::-1]
  axes = vectors[:, kept]
  if d > n:
    axes = train.T @ axes / np.sqrt(values[kept])
  inside = test @ axes
  outside = np.sum(test**2, axis=1) - np.sum(inside**2, axis=1)
  lengths = np.sqrt(np.maximum(outside, 0))[:, None]
  return np.pad(train @ axes, ((0, 0), (0, 1))), np.concatenate([inside, lengths], axis=1)


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
  if count <= len(rest):
    subsets = (rest[balanced_subset(labels[rest], count, seed + i)] for i in range(draws))
    return [Draw(subset, validation, retrain=False) for subset in subsets]
  draws = 1 if count == len(labelled) else draws
  subsets = [labelled[balanced_subset(labels[labelled], count, seed + i)] for i in range(draws)]
  return [
    Draw(np.setdiff1d(subset, validation), np.intersect1d(subset, validation), retrain=True)
    for subset in subsets
  ]


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
  rule: str = "centre",
  l2: Sequence[float] = L2_VALUES,
) -> list[dict[str, Any]]:
  """Linear probe and k-NN of every encoder, at every fraction of the labels.

  Args:
    features: of the training and test images, by encoder.
    train_labels, test_labels: -1 = unlabelled.
    fractions, draws: see `label_draws`; a value is the mean over draws, its interval half their
      range (None for one draw).
    task, step, config, commit: go into every record as they are.
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
  known = {"task": task, "seed": seed, "step": step, "config": config, "commit": commit}
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
        _log.warning(
          "%s, %g %% of the labels: the best l2 is at an edge of %g to %g; a wider grid may be better",
          *(encoder, 100 * fraction, min(l2), max(l2)),
        )
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
  predicted = knn_probe(train.at(used), known.features, classes=classes)
  return float(np.mean(predicted == known.labels))


def _record(
  known: Mapping[str, Any], protocol: str, encoder: str, fraction: float, values: Sequence[float]
) -> dict[str, Any]:
  return {
    "task": known["task"],
    "protocol": protocol,
    "encoder": encoder,
    "labels": fraction,
    "split": "test",
    "metric": "top1",
    "value": float(np.mean(values)),
    "interval": float(np.ptp(values) / 2) if len(values) > 1 else None,
    "n": len(values),
    **known,
  }


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
  """Records as a table for a terminal: encoders by protocols and fractions of the labels, in %."""
  columns = list(dict.fromkeys((r["protocol"], r["labels"]) for r in records))
  columns.sort(key=lambda column: list(dict.fromkeys(p for p, _ in columns)).index(column[0]))
  cells = {(r["encoder"], r["protocol"], r["labels"]): _cell(r) for r in records}
  encoders = list(dict.fromkeys(r["encoder"] for r in records))
  rows = [[cells.get((encoder, *column), "") for column in columns] for encoder in encoders]
  shares = [f"{100 * labels:g} %".ljust(len(f"{100 * labels:g} %")) for _, labels in columns]
  return "\n".join(str(r) for r in (columns, shares, rows))


def _cell(record: Mapping[str, Any]) -> str:
  value, interval = record["value"], record["interval"]
  return f"{100 * value:.1f}" + ("" if interval is None else f" ± {100 * interval:.1f}")


def _check_labels(labels: Int[np.ndarray, "n"], classes: int) -> None:
  if not (labels >= 0).any():
    raise ValueError(f"none of the {len(labels)} examples is labelled; expected classes 0, 1, ...")
  if labels.max() >= classes or classes < 2:
    raise ValueError(
      f"the largest label is {labels.max()} of {classes} classes; expected labels below the number "
      "of classes, and at least 2 classes"
    )


def _padded(
  features: Num[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]
) -> tuple[Float32[np.ndarray, "rows columns"], Int[np.ndarray, "rows"]]:
  """Rows (label -1) and columns of zeros are added, so that few distinct shapes are compiled."""
  n, d = features.shape
  # Multiples of a sixteenth of the next power of two: an eighth more than needed, at most.
  step = max(_ROWS, 2 ** math.ceil(math.log2(n)) // 16)
  rows, columns = math.ceil(n / step) * step, math.ceil(d / _COLUMNS) * _COLUMNS
  x = np.zeros((rows, columns), np.float32)
  x[:n, :d] = features
  y = np.full(rows, -1, np.int32)
  y[:n] = labels
  return x, y
