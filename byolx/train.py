"""The one loop: TrainState, train_step, train. Every protocol that trains by gradient runs here."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from byolx import sharding
from byolx.models.names import ALWAYS_KEPT, BLOCK, CONVOLUTION, STAGE
from byolx.tasks.base import Batch, Task

Scalars = dict[str, Array]
StepFunction = Callable[["TrainState", Batch, Array], tuple["TrainState", Scalars]]

KEPT = {
  "none": None,
  "convolution": (*ALWAYS_KEPT, CONVOLUTION),
  "block": (*ALWAYS_KEPT, BLOCK),
  "stage": (*ALWAYS_KEPT, STAGE),
}
"""What a forward pass keeps for the backward pass, by `train.remat`; the rest is computed again.
`none` leaves it to the compiler, which keeps what it needs and computes nothing twice."""

IN_FLIGHT = 2
"""Steps that may be under way at once; each holds a batch on the devices."""


class DivergedError(RuntimeError):
  """A loss or an update that is not finite, or a gradient beyond its limit, at `step`."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


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


def train(
  step_function: StepFunction,
  state: TrainState,
  batches: Iterator[Batch],
  key: Array,
  *,
  steps: int,
  log_every: int,
  save_when: Callable[[int], bool],
  stop_when: Callable[[int], bool],
  log: Callable[[int, dict[str, float]], None],
  save: Callable[[int, TrainState, dict[str, float]], None],
  most_gradient: float = math.inf,
) -> TrainState:
  """Runs from the state's step to `steps`, or to where it is stopped.

  Args:
    step_function: from `compile_step`, as it is or compiled ahead of time.
    state: is donated.
    batches: on the devices already, starting at the state's step.
    key: of whatever a loss draws; folded with the step.
    steps: to stop at.
    log_every: steps between calls of `log`, which is also called at the end.
    save_when: asked after each step whether to save; the last step and one that stops are saved.
    stop_when: asked after each step whether to stop there.
    log: takes a step (1 is the first) and its scalars.
    save: takes a step, its state, which is good, and its scalars.
    most_gradient: a norm of the gradient above this counts as divergence.

  Raises:
    DivergedError: before a state that is not good would be logged or saved.
  """
  pending: list[tuple[int, Scalars]] = []
  for step in range(int(state.step) + 1, steps + 1):
    state, scalars = step_function(state, next(batches), key)
    pending.append((step, scalars))
    if len(pending) > IN_FLIGHT:
      jax.block_until_ready(pending[-1 - IN_FLIGHT][1])
    stops, last = stop_when(step), step == steps
    saves = save_when(step) or stops or last
    if step % log_every == 0 or saves:
      rows = [(at, _floats(values)) for at, values in pending]
      pending.clear()
      for at, row in rows:
        _refuse_diverged(at, row, most_gradient)
        if at % log_every == 0 or at == steps:
          log(at, row)
      if saves:
        save(step, state, rows[-1][1])
    if stops:
      break
  return state


def _floats(scalars: Scalars) -> dict[str, float]:
  return {name: float(np.asarray(value)) for name, value in jax.device_get(scalars).items()}


def _refuse_diverged(step: int, row: dict[str, float], most_gradient: float) -> None:
  bad = [f"{name}={value}" for name, value in row.items() if not math.isfinite(value)]
  expected = "finite numbers"
  if not bad and row["norm_gradient"] > most_gradient:
    bad = [f"norm_gradient={row['norm_gradient']:.4g}"]
    expected = f"at most train.max_gradient_norm={most_gradient}"
  if bad:
    raise DivergedError(
      f"step {step}: {', '.join(bad)}: expected {expected}. The last good checkpoint is kept; try a"
      " lower optim.base_rate or a longer optim.warmup_epochs.",
      step,
    )
