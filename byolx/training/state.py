"""Training state: the pytree of everything that training changes, and its placement on a mesh."""

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
  """Everything that training changes, as one pytree; a checkpoint stores all of it.

  The leaves are arrays, or shapes or shardings of these.

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
    """Returns the model, merged from copies of the state's variables."""
    return nnx.merge(self.graphdef, self.params, self.rest, copy=True)


class _Stream(nnx.RngStream):
  """An nnx.RngStream with the same keys, which counts its draws in a Python integer.

  flax counts them in a variable. Setting a variable while tracing is slow, because flax then formats
  the whole traced program as text.
  """

  drawn: int = 0

  def __call__(self) -> Array:
    self.drawn += 1
    return jax.random.fold_in(self.key[...], self.drawn - 1)


def new_state(task: Task, tx: optax.GradientTransformation, key: Array) -> TrainState:
  """Returns the state at step 0, a pure function of the key."""
  state = _untrained(task, key)
  return dataclasses.replace(state, opt_state=tx.init(state.params))


def _untrained(task: Task, key: Array) -> TrainState:
  """Returns the state at step 0, with None as the state of the optimiser."""
  rngs = nnx.Rngs(key)
  rngs.default = _Stream(key, tag="default")
  graphdef, params, rest = nnx.split(task.init(rngs), task.trainable, ...)
  return TrainState(jnp.zeros((), jnp.int32), params, rest, None, graphdef)


def abstract_untrained(task: Task) -> TrainState:
  """Returns shapes and types of a new state, with None as the state of the optimiser.

  It traces the whole initialisation, which is slow for a large network (docs/plan.md, "How long it
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
  """Returns the state at step 0, created directly with its shardings.

  Args:
    task: task with the model and its trainable variables.
    tx: optimiser.
    key: key of the initialisation.
    layout: mesh and placement of the state.
    abstract: result of `abstract_state`, to save its computation.
  """
  return initialiser(task, tx, layout, abstract)(key)


def initialiser(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  abstract: TrainState | None = None,
) -> jax.stages.Wrapped:
  """Returns the jitted function from a key to a new state; arguments as in `initialise`."""
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
  """Returns the state with a `jax.ShapeDtypeStruct` with sharding in place of each array.

  Args:
    task: task with the model and its trainable variables.
    tx: optimiser.
    layout: mesh and placement of the state.
    untrained: result of `abstract_untrained`, to save its computation.
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
  """Returns the state with the sharding of each array in place of the array."""
  return jax.tree.map(lambda x: x.sharding, state)
