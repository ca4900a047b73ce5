"""Optimisers: LARS as in the authors' code, SGD and AdamW.

Biases and parameters of normalisations can be excluded from weight decay and LARS's trust ratio.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from byolx.core.fields import above, at_least, between, each, field, one_of
from byolx.models.roles import Role
from byolx.training.schedules import Schedule, warmup_constant, warmup_cosine

Mask = nnx.State

OPTIMIZERS: dict[str, Callable[["OptimizerSpec", Schedule, Mask], optax.GradientTransformation]] = {
  "lars": lambda o, rate, mask: lars(rate, o.weight_decay, o.momentum, o.trust, mask),
  "sgd": lambda o, rate, mask: sgd(rate, o.weight_decay, o.momentum, mask),
  "adamw": lambda o, rate, mask: adamw(rate, o.weight_decay, mask),
}
"""Functions that build an optimiser, by the value of the config field `optim.name`. Each takes the
config group `optim`, the learning rate schedule, and the mask of the parameters with weight decay."""


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """The config group `optim`: optimiser, learning rate and weight decay (appendix A)."""

  name: str = field("lars", "name of the optimiser", one_of(*OPTIMIZERS))
  base_rate: float = field(
    0.2, "peak learning rate, per 256 images of a batch (optim.batch_scaling)", above(0)
  )
  weight_decay: float = field(
    1.5e-6, "weight decay, of all parameters or only of kernels (optim.exclude)", at_least(0)
  )
  momentum: float = field(0.9, "lars, sgd: momentum", between(0, 1))
  trust: float = field(1e-3, "lars: factor eta of the trust ratio", above(0))
  warmup_epochs: float = field(
    10.0, "epochs of linear warm-up; optim.schedule follows", at_least(0)
  )
  rates: tuple[float, ...] = field(
    (),
    "task=linear: base rates of classifiers trained at once, the best of which is selected on the "
    "validation images; if one diverges, the run stops; empty: optim.base_rate",
    each(above(0)),
  )
  batch_scaling: bool = field(True, "scaling of base rates by train.batch_size / 256")
  schedule: str = field(
    "cosine",
    "learning rate after warm-up: a cosine to 0, or constant",
    one_of("cosine", "constant"),
  )
  exclude: bool = field(
    True, "exclusion of biases and normalisations from weight decay and trust ratio"
  )

  def build(
    self, params: nnx.State, batch_size: int, steps: int, warmup_steps: int
  ) -> tuple[Schedule, optax.GradientTransformation]:
    """Builds the learning rate schedule and the optimiser.

    If the field `rates` has several values, one classifier is trained for each of them. The returned
    schedule is that of the first value. The optimiser multiplies each classifier's updates by the
    ratio of its value to the first value.

    Args:
      params: trainable parameters, as arrays or as shapes.
      batch_size: number of images per optimiser step; with `batch_scaling`, the peak rate is
        multiplied by batch_size / 256.
      steps: number of all optimiser steps.
      warmup_steps: number of optimiser steps in the warm-up, in which the learning rate rises from 0.

    Returns:
      The learning rate as a function of the step, and the optimiser.
    """
    mask = adapted(params)
    if not self.exclude:
      mask = jax.tree.map(lambda _: True, mask)
    rates = self.rates or (self.base_rate,)
    peak = rates[0] * (batch_size / 256 if self.batch_scaling else 1.0)
    if self.schedule == "cosine":
      rate = warmup_cosine(peak, warmup_steps, steps)
    else:
      rate = warmup_constant(peak, warmup_steps)
    tx = OPTIMIZERS[self.name](self, rate, mask)
    if len(rates) > 1:
      tx = optax.chain(tx, scale_each([one / rates[0] for one in rates]))
    return rate, tx


def adapted(params: nnx.State) -> Mask:
  """Returns a tree with True for each parameter that gets weight decay and LARS's trust ratio.

  The tree has the structure of `params`, and False for all other parameters.

  Args:
    params: trainable parameters, each with its role (`roles.Role`) as metadata.

  Raises:
    ValueError: a parameter has no role, or holds more than one array.
  """
  flat = nnx.to_flat_state(params)
  missing = [
    ".".join(map(str, path)) for path, variable in flat if not isinstance(role(variable), Role)
  ]
  if missing:
    raise ValueError(f"parameters without a role: {', '.join(missing)}: expected one of {[*Role]}")
  flags = [role(variable).adapted for _, variable in flat]
  leaves = jax.tree.leaves(params)
  if len(leaves) != len(flags):
    raise ValueError(f"{len(leaves)} arrays in {len(flags)} parameters: expected one array each")
  return jax.tree.unflatten(jax.tree.structure(params), flags)


def role(variable: nnx.Variable) -> Role | None:
  """Returns the role of a parameter (kernel, bias or normalisation), or None if it has none."""
  return variable.get_metadata().get("role")


def lars(
  rate: Schedule, weight_decay: float, momentum: float, trust: float, mask: Mask
) -> optax.GradientTransformation:
  """Builds LARS in the order of the authors' code: weight decay, trust ratio, momentum, learning rate.

    g <- g + weight_decay * w;   g <- g * trust * ||w|| / ||g||  (factor 1 where a norm is 0);
    m <- momentum * m + g;       w <- w - rate(k) * m

  `optax.lars` multiplies by the learning rate before momentum, which gives other weights if the
  rate changes.

  Args:
    rate: learning rate as a function of the step.
    weight_decay: factor of w in the term weight_decay * w, which is added to the gradient.
    momentum: factor of the momentum, in [0, 1].
    trust: factor of the trust ratio.
    mask: tree with True for the parameters that get weight decay and the trust ratio. The first
      line of the equation is left out for the others.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=mask),
    optax.masked(scale_by_trust_ratio(trust), mask),
    optax.trace(decay=momentum),
    optax.scale_by_learning_rate(rate),
  )


def scale_by_trust_ratio(trust: float) -> optax.GradientTransformation:
  """Builds an optax transformation that multiplies updates by LARS's trust ratio.

  The update g of an array with the weights w is multiplied by trust * ||w|| / ||g||, or by 1 if a
  norm is 0.

  `optax.scale_by_trust_ratio` gives the same result, but computes each norm twice. This costs two
  more passes over parameters and gradients in each step.

  Args:
    trust: factor of the ratio.
  """

  def scale(updates: optax.Updates, params: optax.Params) -> optax.Updates:
    arrays, structure = jax.tree.flatten(updates)
    if not arrays:
      return updates
    of_param, of_update = _norms(jax.tree.leaves(params)), _norms(arrays)
    none = (of_param == 0) | (of_update == 0)
    ratios = jnp.where(none, 1.0, trust * of_param / jnp.where(none, 1.0, of_update))
    return jax.tree.unflatten(
      structure, [array * ratio for array, ratio in zip(arrays, jnp.unstack(ratios), strict=True)]
    )

  return optax.stateless(scale)


def _norms(arrays: Sequence[jax.Array]) -> jax.Array:
  """Returns a vector that has the l2 norm of each array as one element.

  With all norms in one vector, later operations run once, and not once per array.
  """
  return jnp.sqrt(jnp.stack([jnp.sum(x * x) for x in arrays]))


def sgd(
  rate: Schedule, weight_decay: float, momentum: float, mask: Mask
) -> optax.GradientTransformation:
  """Builds SGD with Nesterov momentum; weight decay is added to the gradient.

  Args:
    rate: learning rate as a function of the step.
    weight_decay: factor of w in the term weight_decay * w, which is added to the gradient.
    momentum: factor of the momentum, in [0, 1].
    mask: tree with True for the parameters that get weight decay.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=mask),
    optax.trace(decay=momentum, nesterov=True),
    optax.scale_by_learning_rate(rate),
  )


def scale_each(factors: Sequence[float]) -> optax.GradientTransformation:
  """Builds an optax transformation that multiplies each classifier's update by a factor of its own.

  Args:
    factors: one factor per classifier. The classifiers are stacked along the first axis of each
      array.
  """

  def scale(update: jax.Array) -> jax.Array:
    column = jnp.asarray(factors, update.dtype).reshape(-1, *(1,) * (update.ndim - 1))
    return update * column

  return optax.stateless(lambda updates, _: jax.tree.map(scale, updates))


def adamw(rate: Schedule, weight_decay: float, mask: Mask) -> optax.GradientTransformation:
  """Builds AdamW, which applies weight decay separately from the gradient.

  The paper does not use AdamW. It is meant for small runs.

  Args:
    rate: learning rate as a function of the step.
    weight_decay: weight decay, which is multiplied by the learning rate.
    mask: tree with True for the parameters that get weight decay.
  """
  return optax.adamw(rate, weight_decay=weight_decay, mask=mask)
