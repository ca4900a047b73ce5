"""Classifiers on frozen features that are solved for, not trained: logistic regression and k-NN.

Multinomial logistic regression by L-BFGS is appendix E.2; weighted k-NN is that of Wu et al. (2018).
Both take arrays of any number of rows and pad them, so that few distinct shapes are compiled.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Num

_MEMORY = 10  # pairs of steps and gradient changes that L-BFGS keeps
_CURVATURE = 0.02  # a typical p (1 - p) at the optimum; any value gives the same optimum
_ROWS, _COLUMNS = 256, 256  # features are padded to multiples of these


class LinearProbes(NamedTuple):
  """One classifier per l2 value, as `linear_probe` found them; logits are x @ kernel + bias.

  Attributes:
    objective: sum of cross-entropies + l2/2 * |kernel|^2, reached.
    converged: whether another step promises less than the tolerance.
    iterations: evaluations of all objectives together.
  """

  kernel: Float32[np.ndarray, "l d classes"]
  bias: Float32[np.ndarray, "l classes"]
  objective: Float32[np.ndarray, "l"]
  converged: Bool[np.ndarray, "l"]
  iterations: int


def linear_probe(
  features: Num[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  l2: Sequence[float],
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
  tolerance: Float[Array, ""],
  max_iterations: Int[Array, ""],
):
  """`linear_probe` on padded arrays: kernel, bias, objective, converged, iterations."""
  counted = (labels >= 0).astype(x.dtype)
  is_label = (labels[:, None] == jnp.arange(classes))[:, None]
  # Parameters are [l, d + 1, classes]: the rows of the kernel, then the bias.
  penalty = jnp.concatenate([jnp.tile(l2[:, None], (1, x.shape[1])), jnp.zeros((len(l2), 1))], 1)
  second_moments = jnp.append(counted @ x**2, counted.sum())
  # In these units the Hessian is near the identity, which is where L-BFGS starts from.
  units = 1 / jnp.sqrt(_CURVATURE * second_moments + penalty + 1e-12)[:, :, None]

  def objectives(scaled: Float32[Array, "l p classes"]) -> Float32[Array, "l"]:
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
  converged = jnp.isfinite(end.value) & (end.slope <= tolerance * jnp.abs(end.value))
  return w[:, :-1], w[:, -1], end.value, converged, end.iterations


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
  tolerance: Float[Array, ""],
  max_iterations: Int[Array, ""],
) -> _Search:
  """Minimises l independent convex objectives at once, by L-BFGS with backtracking.

  One loop, and one evaluation of all objectives each time round: each objective either takes its
  step or halves it. (`jax.vmap` of `optax.lbfgs` runs both branches of every conditional of its line
  search, and each search until the last objective is content: it took nine times as long for digits.)
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
  x = np.zeros((_padded_rows(n), math.ceil(d / _COLUMNS) * _COLUMNS), np.float32)
  x[:n, :d] = features
  y = np.full(len(x), -1, np.int32)
  y[:n] = labels
  return x, y


def _padded_rows(n: int) -> int:
  """n in whole 1/16 of the next power of two: at most an eighth more, beyond a few hundred."""
  step = max(_ROWS, 2 ** math.ceil(math.log2(n)) // 16)
  return math.ceil(n / step) * step
