"""The train step of every task, and the function that compiles it for a mesh of devices."""

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
  """Runs one optimiser step: gradients of all micro-batches, an update, and `task.after_update`.

  The function changes none of its arguments: batch statistics and target network change in a copy
  of the model.

  Args:
    task: task that defines the loss and the trainable variables.
    tx: optimiser.
    passes: number of micro-batches over which gradients are averaged.
    remat: name of the rematerialisation policy, a key of `remat.KEPT`. The policy selects the values
      that the backward pass computes again.
    layout: mesh of devices, and rule that places the state on it.
    state: training state.
    batch: all micro-batches, as one batch; the length of each array's first axis is a multiple of
      `passes`.
    key: random key of the run, from which the key of this step is derived.

  Returns:
    The new state and a dictionary of scalars. It holds the scalars of the loss, averaged over the
    micro-batches, and the scalars of `task.after_update`. It also holds `norm_gradient` and
    `norm_update`, the l2 norms of gradient and update.
  """
  key = jax.random.fold_in(key, state.step)
  gradient = functools.partial(_gradient, task, remat, layout, state.graphdef, state.params)
  if passes == 1:
    grads, rest, scalars = gradient(state.rest, batch, key)
  else:
    grads, rest, scalars = _accumulate(gradient, passes, state, batch, key)
  params = _constrain(state.params, layout.of_rest)  # each device updates its shards only
  updates, opt_state = tx.update(grads, state.opt_state, params)
  params = optax.apply_updates(params, updates)
  model = nnx.merge(state.graphdef, params, rest, copy=True)
  update_scalars = task.after_update(model, state.step)
  graphdef, params, rest = nnx.split(model, task.trainable, ...)
  scalars = scalars | update_scalars
  scalars = scalars | {"norm_gradient": _norm(grads), "norm_update": _norm(updates)}
  return TrainState(state.step + 1, params, rest, opt_state, graphdef), scalars


def _norm(tree: Any) -> Array:
  """Computes the l2 norm over all arrays of a tree, as one number.

  All scalars and vectors are joined into one array, because one sum compiles to fewer kernels than
  one sum per array (docs/plan.md, "How long it takes to start").
  """
  leaves = jax.tree.leaves(tree)
  vectors = [x.ravel() for x in leaves if x.ndim < 2]
  others = [x for x in leaves if x.ndim >= 2]
  return optax.tree.norm([*others, jnp.concatenate(vectors)] if vectors else others)


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
  """Computes the gradient of the loss of one micro-batch.

  Args:
    task: task that defines the loss and the trainable variables.
    remat: name of the rematerialisation policy, a key of `remat.KEPT`.
    layout: mesh of devices, and rule that places the gradient on it.
    graphdef: static structure of the model.
    params: trainable variables.
    rest: all other variables of the model.
    batch: the micro-batch.
    key: random key of the loss.

  Returns:
    The gradient, the values of `rest` after the forward pass, and the scalars that the loss returns.
  """

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
  """Averages gradients and scalars over the micro-batches of a batch, one after the other (Table 16).

  Every micro-batch updates the batch statistics.

  Args:
    gradient: function that computes the gradient of one micro-batch. It takes the variables that the
      optimiser does not update, the micro-batch and a random key. It returns the gradient, the
      values of these variables after the forward pass, and scalars.
    passes: number of micro-batches.
    state: training state.
    batch: all micro-batches, as one batch.
    key: random key of the step, from which each micro-batch's key is derived.

  Returns:
    The averaged gradient, the model's other variables as they are after the last micro-batch, and
    the averaged scalars.
  """

  def split(x: Array) -> Array:
    # Micro-batch i has the rows i, i + passes, ..., so that no row moves to another device.
    return jnp.swapaxes(x.reshape(x.shape[0] // passes, passes, *x.shape[1:]), 0, 1)

  def add_pass(carry, inputs):
    total, rest = carry
    index, micro = inputs
    grads, rest, scalars = gradient(rest, micro, jax.random.fold_in(key, index))
    return (jax.tree.map(jnp.add, total, grads), rest), scalars

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  inputs = (jnp.arange(passes), jax.tree.map(split, batch))
  (total, rest), scalars = jax.lax.scan(add_pass, (zeros, state.rest), inputs)
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
  """Returns the jitted train step for a mesh: a function of state, batch and random key.

  The step donates the state, whose arrays are placed as `layout` says. Each batch is sharded over all
  devices by example.

  The jitted function returns the new state and a dictionary of scalars.

  Args:
    task: task that defines the loss and the trainable variables.
    tx: optimiser.
    layout: mesh of devices, and rule that places the state on it.
    passes: number of micro-batches over which gradients are averaged.
    remat: name of the rematerialisation policy, a key of `remat.KEPT`.
    abstract: shapes, types and shardings of the state, if `abstract_state` has been called already;
      None to call it here if needed.
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
