"""TrainState: everything that training changes, made, described and placed on a mesh."""

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
  """Everything that training changes: one pytree, one checkpoint.

  `step` is an int32 scalar, of any leaf type: jax builds this class around shapes and shardings too.
  `params` are what the optimiser sees; `rest` is every other variable (statistics, target network,
  frozen parameters).
  """

  step: Any
  params: nnx.State
  rest: nnx.State
  opt_state: optax.OptState
  graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

  def model(self) -> nnx.Module:
    """The model, merged from copies of the state's variables."""
    return nnx.merge(self.graphdef, self.params, self.rest, copy=True)


class _Stream(nnx.RngStream):
  """The same keys, counted outside of the traced program.

  flax counts in a variable, and to set one under tracing prints all that was traced so far: half of
  the seconds that tracing a ResNet-50's initialisation took, and more than half of a larger one's.
  """

  drawn: int = 0

  def __call__(self) -> Array:
    self.drawn += 1
    return jax.random.fold_in(self.key[...], self.drawn - 1)


def new_state(task: Task, tx: optax.GradientTransformation, key: Array) -> TrainState:
  """A state at step 0, a pure function of the key."""
  state = _untrained(task, key)
  return dataclasses.replace(state, opt_state=tx.init(state.params))


def _untrained(task: Task, key: Array) -> TrainState:
  """A state at step 0 without the optimiser's."""
  rngs = nnx.Rngs(key)
  rngs.default = _Stream(key, tag="default")
  graphdef, params, rest = nnx.split(task.init(rngs), task.trainable, ...)
  return TrainState(jnp.zeros((), jnp.int32), params, rest, None, graphdef)


def abstract_untrained(task: Task) -> TrainState:
  """Shapes and types of a state without the optimiser's: seconds of tracing for a large network."""
  return jax.eval_shape(functools.partial(_untrained, task), jax.random.key(0))


def initialise(
  task: Task,
  tx: optax.GradientTransformation,
  key: Array,
  layout: sharding.Layout,
  abstract: TrainState | None = None,
) -> TrainState:
  """A new state, made where it lives; `abstract` as for `compile_step`."""
  return initialiser(task, tx, layout, abstract)(key)


def initialiser(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  abstract: TrainState | None = None,
) -> jax.stages.Wrapped:
  """The jitted function that makes a new state of a key; arguments as for `initialise`."""
  return jax.jit(
    functools.partial(new_state, task, tx),
    in_shardings=sharding.replicated(layout.mesh),
    out_shardings=state_shardings(abstract or abstract_state(task, tx, layout)),
    # Runs once: more would take the compiler of a CPU longer than it saves, and less runs longer.
    compiler_options={"xla_backend_optimization_level": 1},
  )


def abstract_state(
  task: Task,
  tx: optax.GradientTransformation,
  layout: sharding.Layout,
  untrained: TrainState | None = None,
) -> TrainState:
  """Shapes, types and shardings of the state, without its arrays.

  Args:
    task, tx: loss and optimiser.
    layout: where the state lives.
    untrained: from `abstract_untrained`, if it is there already.
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
  """Where each array of a state lives."""
  return jax.tree.map(lambda x: x.sharding, state)
