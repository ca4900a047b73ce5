"""The one loop: TrainState, train_step, train. Every protocol that trains by gradient runs here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from byolx.core import sharding
from byolx.models.remat import KEPT
from byolx.training.state import Scalars, TrainState, abstract_state, state_shardings
from byolx.training.task import Batch, Task

StepFunction = Callable[["TrainState", Batch, Array], tuple["TrainState", Scalars]]


def train_step(
  task: Task,
  tx: optax.GradientTransformation,
  passes: int,
  remat: str,
  layout: sharding.Layout,
  state: TrainState,
  batch: Batch,
  key: Array,
) -> tuple[TrainState, Scalars]:
  """One optimiser step: gradients over `passes` micro-batches, one update, one `after_update`.

  Mutation (statistics, the moving average) happens inside the merged model only; outside, everything
  is a value. The scalars are means over the micro-batches, plus the norms of gradient and update.
  """
  key = jax.random.fold_in(key, state.step)
  gradient = functools.partial(_gradient, task, remat, layout, state.graphdef, state.params)
  if passes == 1:
    grads, rest, scalars = gradient(state.rest, batch, key)
  else:
    grads, rest, scalars = _accumulate(gradient, passes, state, batch, key)
  params = _constrain(state.params, layout.of_rest)  # each device updates its pieces only
  updates, opt_state = tx.update(grads, state.opt_state, params)
  params = optax.apply_updates(params, updates)
  model = nnx.merge(state.graphdef, params, rest, copy=True)
  moved = task.after_update(model, state.step)
  graphdef, params, rest = nnx.split(model, task.trainable, ...)
  norms = {"norm_gradient": _norm(grads), "norm_update": _norm(updates)}
  return TrainState(state.step + 1, params, rest, opt_state, graphdef), scalars | moved | norms


def _norm(tree: Any) -> Array:
  """The l2 norm of all arrays together; the vectors, two in three of them, are joined to be one sum."""
  leaves = jax.tree.leaves(tree)
  short = [x.ravel() for x in leaves if x.ndim < 2]
  others = [x for x in leaves if x.ndim >= 2]
  return optax.tree.norm([*others, jnp.concatenate(short)] if short else others)


def _constrain(tree: Any, shardings: Callable[[Any], Any]) -> Any:
  return jax.lax.with_sharding_constraint(tree, shardings(tree))


def _gradient(
  task: Task,
  remat: str,
  layout: sharding.Layout,
  graphdef: nnx.GraphDef,
  params: nnx.State,
  rest: nnx.State,
  batch: Batch,
  key: Array,
) -> tuple[nnx.State, nnx.State, Scalars]:
  """Gradient, variables after the forward pass, and scalars of one micro-batch."""

  def loss_of(params: nnx.State) -> tuple[Array, tuple[nnx.State, Scalars]]:
    model = nnx.merge(graphdef, params, rest, copy=True)
    loss, scalars = task.loss(model, batch, key)
    return loss, (nnx.split(model, task.trainable, ...)[2], scalars)

  if KEPT[remat] is not None:
    names = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
    loss_of = jax.checkpoint(loss_of, policy=names)
  with sharding.using(layout):
    grads, (rest_after, scalars) = jax.grad(loss_of, has_aux=True)(params)
  return _constrain(grads, layout.of_rest), rest_after, scalars


def _accumulate(
  gradient: Callable, passes: int, state: TrainState, batch: Batch, key: Array
) -> tuple[nnx.State, nnx.State, Scalars]:
  """Averages gradients over consecutive forward passes (Table 16); statistics see every pass."""

  def cut(x: Array) -> Array:
    # Rows i, i + passes, ...: each device finds its rows of every micro-batch among its own.
    return jnp.swapaxes(x.reshape(x.shape[0] // passes, passes, *x.shape[1:]), 0, 1)

  def one(carry, inputs):
    total, rest = carry
    index, micro = inputs
    grads, rest, scalars = gradient(rest, micro, jax.random.fold_in(key, index))
    return (jax.tree.map(jnp.add, total, grads), rest), scalars

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  inputs = (jnp.arange(passes), jax.tree.map(cut, batch))
  (total, rest), scalars = jax.lax.scan(one, (zeros, state.rest), inputs)
  return (
    jax.tree.map(lambda g: g / passes, total),
    rest,
    jax.tree.map(lambda x: jnp.mean(x, axis=0), scalars),
  )


def compile_step(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  *,
  passes: int = 1,
  remat: str = "none",
  abstract: TrainState | None = None,
) -> jax.stages.Wrapped:
  """The jitted step over a mesh: the state (donated) as the layout has it, batches spread by example.

  Args:
    task, tx: loss and optimiser.
    layout: where the state lives.
    passes: forward passes over which gradients are averaged.
    remat: what the backward pass finds kept, see KEPT.
    abstract: from `abstract_state`, if it is there already.
  """
  everywhere, spread = sharding.replicated(layout.mesh), sharding.by_example(layout.mesh)
  places = everywhere
  if layout.state != "replicated":
    places = state_shardings(abstract or abstract_state(task, tx, layout))
  return jax.jit(
    functools.partial(train_step, task, tx, passes, remat, layout),
    in_shardings=(places, spread, everywhere),
    out_shardings=(places, everywhere),
    donate_argnums=0,
  )
