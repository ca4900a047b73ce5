"""Multinomial logistic regression on frozen features, by L-BFGS (appendix E.2).

Arrays are padded with zeros to a few distinct shapes, because each new shape must be compiled.
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

_MEMORY = 10  # number of past steps and gradient changes that L-BFGS stores
_CURVATURE = (
  0.02  # typical p (1 - p) at the optimum, for scaling; the optimum does not depend on it
)
_ROWS, _COLUMNS = 256, 256  # features are padded to multiples of these


class LinearProbes(NamedTuple):
  """Linear classifiers, one per l2 penalty. The logits of features x are x @ kernel + bias.

  Attributes:
    kernel: weights, float32[l, d, classes], for l penalties and d features.
    bias: biases, float32[l, classes].
    objective: final value of the objective, the sum of cross-entropies + l2/2 * |kernel|^2, float32[l].
    converged: whether the next step is expected to reduce the objective by less than the tolerance,
      bool[l].
    iterations: number of iterations of the search. Each evaluates the objectives of all classifiers.
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
  """Fits multinomial logistic regressions for several l2 penalties at once, by L-BFGS (appendix E.2).

  Minimises the sum of cross-entropies + l2/2 * |kernel|^2; the bias is not penalised. This equals
  scikit-learn's `LogisticRegression(C=1 / l2)`.

  Args:
    features: features of the images, real numbers. Features from `probes.preprocess` (centred, scaled
      and rotated) need fewer iterations.
    labels: class of each row of the features; rows with label -1 are ignored.
    l2: penalties, finite and above 0.
    classes: number of classes, at least 2.
    tolerance: the search stops when the next step is expected to reduce the objective by less than this
      fraction. float32 cannot resolve values below about 1e-7.
    max_iterations: largest number of iterations.

  Returns:
    One classifier per l2 penalty.

  Raises:
    ValueError: no row is labelled, a label is not below `classes`, `classes` is below 2, or a penalty is
      not a finite number above 0.
  """
  _check_labels(labels, classes)
  if not l2 or not all(value > 0 and math.isfinite(value) for value in l2):
    raise ValueError(f"the l2 values are {list(l2)}; expected one or more finite numbers above 0")
  d = features.shape[1]
  x, y = _padded(features, labels)
  results = _fit(x, y, np.asarray(l2, np.float32), classes, tolerance, max_iterations)
  kernel, bias, objective, converged, iterations = jax.device_get(results)
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
  """Fits logistic regressions for several l2 penalties to padded arrays (see `linear_probe`).

  Returns the arrays kernel, bias, objective, converged and iterations of `LinearProbes`.
  """
  counted = (labels >= 0).astype(x.dtype)
  is_label = (labels[:, None] == jnp.arange(classes))[:, None]
  # Parameters are [l, d + 1, classes]: the rows of the kernel, then the bias.
  penalty = jnp.concatenate([jnp.tile(l2[:, None], (1, x.shape[1])), jnp.zeros((len(l2), 1))], 1)
  second_moments = jnp.append(counted @ x**2, counted.sum())
  # In these units the Hessian is near the identity, which is the first estimate of L-BFGS.
  units = 1 / jnp.sqrt(_CURVATURE * second_moments + penalty + 1e-12)[:, :, None]

  def objectives(scaled: Float32[Array, "l p classes"]) -> Float32[Array, "l"]:
    w = scaled * units
    logits = jnp.einsum("nd,ldk->nlk", x, w[:, :-1], precision="highest") + w[:, -1]
    label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    other_logits = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    # log sum_j exp(z_j) - z_y, in a form that keeps float32's precision near 0.
    cross_entropy = jax.nn.softplus(other_logits - label_logit)
    return counted @ cross_entropy + 0.5 * jnp.sum(penalty[:, :, None] * w**2, axis=(1, 2))

  start = jnp.zeros((len(l2), x.shape[1] + 1, classes), x.dtype)
  end = _minimise(objectives, start, tolerance, max_iterations)
  w = end.point * units
  converged = jnp.isfinite(end.value) & (end.slope <= tolerance * jnp.abs(end.value))
  return w[:, :-1], w[:, -1], end.value, converged, end.iterations


class _Search(NamedTuple):
  """State of L-BFGS for l objectives that are minimised in parallel.

  The next trial point is point - length * direction.
  """

  point: Float32[Array, "l a b"]
  value: Float32[Array, "l"]
  direction: Float32[Array, "l a b"]
  slope: Float32[Array, "l"]  # gradient . direction: twice the expected reduction by a unit step
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

  Each iteration evaluates all objectives once. Each objective then either accepts its step or halves the
  step length. `jax.vmap` of `optax.lbfgs` is slower: it computes both branches of the conditionals in
  its line search, and repeats the search until all objectives accept.

  Args:
    objectives: function from l points to the values of the l objectives.
    start: the l points from which the search starts.
    tolerance: the search of an objective stops when the next step is expected to reduce it by less than
      this fraction.
    max_iterations: largest number of iterations.

  Returns:
    The last state of the search, with the final points and values.
  """
  lbfgs = optax.scale_by_lbfgs(_MEMORY)
  n = len(start)

  def dot(a, b):
    return jnp.sum(a * b, axis=(1, 2))

  def body(s: _Search) -> _Search:
    trial = s.point - s.length[:, None, None] * s.direction
    value, pullback = jax.vjp(objectives, trial)
    (gradient,) = pullback(jnp.ones(n))
    # Armijo's condition, with a margin for float32's rounding.
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

  # The first iteration evaluates the start itself and accepts it, since the value before is infinite.
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
  """Pads features and labels to one of a few shapes, because each new shape must be compiled.

  Appended rows and columns of the features are zero. Appended labels are -1, which means unlabelled.
  """
  n, d = features.shape
  x = np.zeros((_padded_rows(n), math.ceil(d / _COLUMNS) * _COLUMNS), np.float32)
  x[:n, :d] = features
  y = np.full(len(x), -1, np.int32)
  y[:n] = labels
  return x, y


def _padded_rows(n: int) -> int:
  """Rounds a number of rows n up, so that few distinct numbers remain.

  The result is a multiple of `_ROWS` or, for large n, of 1/16 of the next power of two.
  """
  step = max(_ROWS, 2 ** math.ceil(math.log2(n)) // 16)
  return math.ceil(n / step) * step
