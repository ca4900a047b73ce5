"""Training state: a pytree of all values that training changes, and its placement on the devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from byolx.core import sharding
from byolx.training.task import Task

Scalars = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All values that training changes, as one pytree; a checkpoint stores all of it.

  The leaves are arrays; some functions return a `TrainState` with shapes or shardings in their
  place.

  Attributes:
    step: number of optimiser steps done, an int32 scalar.
    params: trainable variables, which the optimiser updates.
    rest: all other variables: batch statistics, target network, frozen parameters.
    opt_state: state of the optimiser.
    graphdef: static structure of the model.
  """

  step: Any
  params: nnx.State
  rest: nnx.State
  opt_state: optax.OptState
  graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

  def model(self) -> nnx.Module:
    """Returns the model of this state, built from copies of the variables."""
    return nnx.merge(self.graphdef, self.params, self.rest, copy=True)


class _Stream(nnx.RngStream):
  """Stream of random keys, which is faster to trace than `nnx.RngStream` and gives the same keys.

  It counts the drawn keys by a Python integer. `nnx.RngStream` counts them by an nnx variable, which
  is slow, because flax formats the whole traced program as text at each change of a variable.
  """

  drawn: int = 0

  def __call__(self) -> Array:
    self.drawn += 1
    return jax.random.fold_in(self.key[...], self.drawn - 1)


def new_state(task: Task, tx: optax.GradientTransformation, key: Array) -> TrainState:
  """Returns a new training state at step 0; the same random key always gives the same state.

  Args:
    task: task that defines the model and its trainable variables.
    tx: optimiser.
    key: random key of the parameters.
  """
  state = _untrained(task, key)
  return dataclasses.replace(state, opt_state=tx.init(state.params))


def _untrained(task: Task, key: Array) -> TrainState:
  """Returns a task's new training state at step 0, with None in place of the optimiser's state."""
  rngs = nnx.Rngs(key)
  rngs.default = _Stream(key, tag="default")
  graphdef, params, rest = nnx.split(task.init(rngs), task.trainable, ...)
  return TrainState(jnp.zeros((), jnp.int32), params, rest, None, graphdef)


def abstract_untrained(task: Task) -> TrainState:
  """Returns the shapes and types of a task's new training state, with None for the optimiser's state.

  The whole initialisation is traced, which is slow for a large network (docs/plan.md, "How long it
  takes to start").
  """
  return jax.eval_shape(functools.partial(_untrained, task), jax.random.key(0))


def initialise(
  task: Task,
  tx: optax.GradientTransformation,
  key: Array,
  layout: sharding.Layout,
  abstract: TrainState | None = None,
) -> TrainState:
  """Creates a new training state at step 0.

  Each array is created directly on the devices that hold it.

  Args:
    task: task that defines the model and its trainable variables.
    tx: optimiser.
    key: random key of the parameters.
    layout: mesh of devices, and rule that places the state on it.
    abstract: shapes, types and shardings of the state, if `abstract_state` has been called already;
      None to call it here.
  """
  return initialiser(task, tx, layout, abstract)(key)


def initialiser(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  abstract: TrainState | None = None,
) -> jax.stages.Wrapped:
  """Returns the jitted function that takes a random key and returns a new training state at step 0.

  Args:
    task: task that defines the model and its trainable variables.
    tx: optimiser.
    layout: mesh of devices, and rule that places the state on it.
    abstract: shapes, types and shardings of the state, if `abstract_state` has been called already;
      None to call it here.
  """
  return jax.jit(
    functools.partial(new_state, task, tx),
    in_shardings=sharding.replicated(layout.mesh),
    out_shardings=state_shardings(abstract or abstract_state(task, tx, layout)),
    # The program runs only once: level 2 compiles too long for that, and level 0 runs too long
    # (docs/plan.md, "How long it takes to start").
    compiler_options={"xla_backend_optimization_level": 1},
  )


def abstract_state(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  untrained: TrainState | None = None,
) -> TrainState:
  """Returns the shapes, types and shardings of a training state.

  The result is a `TrainState` that has a `jax.ShapeDtypeStruct` in place of each array.

  Args:
    task: task that defines the model and its trainable variables.
    tx: optimiser.
    layout: mesh of devices, and rule that places the state on it.
    untrained: shapes and types of the state without the optimiser's, if `abstract_untrained` has
      been called already; None to call it here.
  """
  state = untrained or abstract_untrained(task)
  state = dataclasses.replace(state, opt_state=jax.eval_shape(tx.init, state.params))
  places = TrainState(
    sharding.replicated(layout.mesh),
    layout.of_params(state.params),
    layout.of_rest(state.rest),
    layout.of_rest(state.opt_state),
    state.graphdef,
  )
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
  )


def state_shardings(state: TrainState) -> TrainState:
  """Returns a training state with the sharding of each array in place of the array."""
  return jax.tree.map(lambda x: x.sharding, state)
