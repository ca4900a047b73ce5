"""The one loop: gradients over micro-batches, one state on any mesh, what is logged and saved."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import nnx

from byolx.core import sharding
from byolx.models.batch_norm import BatchNorm
from byolx.models.layers import Linear
from byolx.training.loop import DivergedError, train
from byolx.training.state import abstract_state, initialise, new_state
from byolx.training.step import compile_step
from byolx.training.task import Task

KEY = jax.random.key(5)
RATE = 0.25


class Net(nnx.Module):
  """Linear, batch normalisation, a frozen factor; a shadow that follows the kernel."""

  def __init__(self, group, rngs):
    self.layer = Linear(3, 2, rngs=rngs)
    self.norm = BatchNorm(2, group=group)
    self.frozen = nnx.Param(jnp.full(2, 1.5))
    self.shadow = nnx.Param(jnp.zeros((3, 2)))
    self.moves = nnx.BatchStat(jnp.zeros((), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Toy(Task):
  """A regression that has everything a protocol may have, but compiles in a moment."""

  bn_group: int = 0
  normalise: bool = True
  traces: list = dataclasses.field(default_factory=list, compare=False)

  group: ClassVar = "toy"
  trainable: ClassVar = nnx.Any(
    nnx.PathContains("layer"), nnx.All(nnx.PathContains("norm"), nnx.Param)
  )

  def init(self, rngs):
    return Net(self.bn_group, rngs)

  def loss(self, model, batch, key):
    self.traces.append(1)
    out = model.layer(batch["x"])
    if self.normalise:
      out = model.norm(out, train=True)
    loss = jnp.mean((out * model.frozen[...] - batch["y"]) ** 2)
    return loss, {"loss": loss, "draw": jax.random.uniform(key)}

  def after_update(self, model, step):
    model.shadow.set_value(0.5 * (model.shadow[...] + model.layer.kernel[...]))
    model.moves.set_value(model.moves[...] + 1)
    return {"tau": step.astype(jnp.float32)}

  def evaluate(self, model, batch):
    return metrics.Collection.empty()


def toy_batch(step, rows=16):
  rng = np.random.default_rng([7, step])
  x = rng.normal(size=(rows, 3)) * np.linspace(0.5, 3, rows)[:, None] + np.arange(rows)[:, None] % 3
  return {"x": x.astype(np.float32), "y": rng.normal(size=(rows, 2)).astype(np.float32)}


def toy_batches(first=0, mesh=None):
  mesh = mesh or sharding.make_mesh(1)
  step = first
  while True:
    yield sharding.put_batch(toy_batch(step), mesh)
    step += 1


def start(task, devices=1, tx=None):
  """(state, transformation, mesh); the same numbers on any mesh."""
  mesh, tx = sharding.make_mesh(devices), tx or optax.sgd(RATE)
  state = jax.device_get(new_state(task, tx, jax.random.key(0)))
  return jax.device_put(state, sharding.replicated(mesh)), tx, mesh


def host(tree):
  return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def variables(state):
  return {
    ".".join(map(str, p)): np.array(v[...]) for p, v in nnx.to_flat_state(nnx.state(state.model()))
  }


def one_step(task, devices, passes, batch):
  """(variables before, variables after, scalars, state) of one step of SGD."""
  state, tx, mesh = start(task, devices)
  before = variables(state)
  step = compile_step(task, tx, sharding.Layout(mesh), passes=passes)
  state, scalars = step(state, sharding.put_batch(batch, mesh), KEY)
  return before, variables(state), jax.device_get(scalars), state


def by_hand(before, x, y, rows):
  """Mean gradients over groups of rows, by the formulas of a linear layer and batch normalisation.

  Returns gradients of kernel, scale and offset, then the groups' losses, means and variances.
  """
  kernel, factor = before["layer.kernel"].astype(np.float64), 1.5
  grads, losses, means, variances = (
    {"layer.kernel": 0, "norm.scale": 0, "norm.offset": 0},
    [],
    [],
    [],
  )
  for group in rows:
    xs, ys = x[group].astype(np.float64), y[group]
    h = xs @ kernel
    std = np.sqrt(h.var(0) + 1e-5)
    unit = (h - h.mean(0)) / std
    error = factor * unit - ys
    pull = 2 * factor * error / error.size
    inner = (pull - pull.mean(0) - unit * (pull * unit).mean(0)) / std
    parts = {
      "layer.kernel": xs.T @ inner,
      "norm.scale": (pull * unit).sum(0),
      "norm.offset": pull.sum(0),
    }
    grads = {name: grads[name] + part / len(rows) for name, part in parts.items()}
    losses.append((error**2).mean())
    means.append(h.mean(0))
    variances.append(h.var(0))
  return grads, losses, means, variances


@pytest.mark.parametrize("devices", [1, 4])
def test_micro_batches_average_gradients_and_move_the_rest_once(devices):
  passes, batch = 4, toy_batch(0)
  before, after, scalars, state = one_step(Toy(), devices, passes, batch)
  groups = [np.arange(16)[i::passes] for i in range(passes)]
  grads, losses, means, variances = by_hand(before, batch["x"], batch["y"], groups)
  for name, gradient in grads.items():
    np.testing.assert_allclose(before[name] - after[name], RATE * gradient, atol=1e-6)
  np.testing.assert_allclose(scalars["loss"], np.mean(losses), rtol=1e-5)
  squares = sum(np.sum(g**2) for g in grads.values())
  np.testing.assert_allclose(scalars["norm_gradient"], np.sqrt(squares), rtol=1e-4)
  np.testing.assert_allclose(scalars["norm_update"], RATE * np.sqrt(squares), rtol=1e-4)
  # Statistics see every pass, in order ...
  mean = var = 0.0
  for m, v in zip(means, variances, strict=True):
    mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
  np.testing.assert_allclose(after["norm.mean"], mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(after["norm.var"], var, rtol=1e-4)
  assert after["norm.updates"] == passes
  # ... and what follows the update moves once, after it, with the step before its increment.
  np.testing.assert_allclose(after["shadow"], 0.5 * after["layer.kernel"], rtol=1e-6)
  assert after["moves"] == 1
  assert scalars["tau"] == 0
  assert int(state.step) == 1


def test_without_normalisation_any_number_of_passes_is_the_same_step():
  one, four = (one_step(Toy(normalise=False), 1, passes, toy_batch(0))[1] for passes in (1, 4))
  for name, value in one.items():
    np.testing.assert_allclose(value, four[name], atol=1e-6)


def test_a_bn_group_normalises_the_halves_of_a_pass_apart():
  batch = toy_batch(0)
  before, after, scalars, _ = one_step(Toy(bn_group=8), 1, 1, batch)
  halves = [np.arange(8), np.arange(8, 16)]
  grads, losses, means, variances = by_hand(before, batch["x"], batch["y"], halves)
  for name, gradient in grads.items():
    np.testing.assert_allclose(before[name] - after[name], RATE * gradient, atol=1e-6)
  np.testing.assert_allclose(scalars["loss"], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(after["norm.mean"], 0.1 * np.mean(means, 0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(after["norm.var"], 0.1 * np.mean(variances, 0), rtol=1e-4)
  assert after["norm.updates"] == 1
  whole = by_hand(before, batch["x"], batch["y"], [np.arange(16)])
  assert abs(np.mean(whole[1]) - np.mean(losses)) > 1e-2


def test_only_trainable_variables_are_trained():
  before, after, _, state = one_step(Toy(), 1, 1, toy_batch(0))
  np.testing.assert_array_equal(before["frozen"], after["frozen"])
  trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state.params)}
  assert trained == {"layer.kernel", "layer.bias", "norm.scale", "norm.offset"}
  for name in ("layer.kernel", "norm.scale", "norm.offset"):
    assert np.abs(before[name] - after[name]).max() > 1e-3


@pytest.fixture(scope="module")
def running():
  """A toy's compiled step with momentum on one device, its task, and a maker of first states."""
  task, tx = Toy(), optax.sgd(0.05, momentum=0.9)
  step = compile_step(task, tx, sharding.Layout(sharding.make_mesh(1)))
  return step, task, lambda: start(task, 1, tx)[0]


def test_one_compilation_serves_every_step(running):
  step, task, first = running
  state, batches = first(), toy_batches()
  draws = []
  for k in range(5):
    state, scalars = step(state, next(batches), KEY)
    draws.append(float(scalars["draw"]))
    assert float(scalars["tau"]) == k
    traces = len(task.traces) if k == 0 else traces
  assert len(task.traces) == traces
  assert step._cache_size() == 1
  assert int(state.step) == 5
  assert len(set(draws)) == 5  # the key is folded with the step


def test_the_state_is_donated_and_nothing_else(running):
  step, _, first = running
  state, batch = first(), next(toy_batches())
  leaves = jax.tree.leaves(state)
  step(state, batch, KEY)
  assert all(leaf.is_deleted() for leaf in leaves)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, KEY)))


def test_a_new_state_is_a_function_of_the_key_on_any_mesh():
  task, tx = Toy(), optax.sgd(RATE, momentum=0.9)
  states = {
    n: initialise(task, tx, jax.random.key(3), sharding.Layout(sharding.make_mesh(n)))
    for n in (1, 8)
  }
  for one, eight in zip(*(host(state) for state in states.values()), strict=True):
    np.testing.assert_array_equal(one, eight)
  for leaf in jax.tree.leaves(states[8]):
    assert len(leaf.sharding.device_set) == 8
    assert leaf.is_fully_replicated
  other = initialise(task, tx, jax.random.key(4), sharding.Layout(sharding.make_mesh(1)))
  kernels = [variables(state)["layer.kernel"] for state in (states[1], other)]
  assert not np.isclose(*kernels).any()


def test_the_abstract_state_has_the_shapes_types_and_places_of_the_real_one():
  task, tx, mesh = Toy(), optax.sgd(RATE, momentum=0.9), sharding.make_mesh(2)
  real = initialise(task, tx, jax.random.key(0), sharding.Layout(mesh))
  abstract = abstract_state(task, tx, sharding.Layout(mesh))
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for ours, theirs in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_a_merged_model_is_a_copy():
  state, _, _ = start(Toy())
  before = host(state)
  model = state.model()
  model.layer.kernel.set_value(model.layer.kernel[...] + 1)
  for old, new in zip(before, host(state), strict=True):
    np.testing.assert_array_equal(old, new)


# The loop.


def counting(state, batch, key):
  """A step that only counts, and logs what it was given."""
  scalars = {"loss": jnp.asarray(batch, jnp.float32), "norm_gradient": jnp.float32(1)}
  return dataclasses.replace(state, step=state.step + 1), scalars


def loop(step_function, state, batches, *, save_every, stop_at=None, **options):
  """(final state, logged rows, saved steps, what happened in order)."""
  rows, saved, events = {}, {}, []

  def log(step, scalars):
    rows[step] = scalars
    events.append(("log", step))

  def save(step, current, scalars):
    assert int(current.step) == step
    assert step not in rows or rows[step] == scalars
    saved[step] = host(current)
    events.append(("save", step))

  result = None
  try:
    result = train(
      step_function,
      state,
      batches,
      KEY,
      log=log,
      save=save,
      save_when=lambda step: step % save_every == 0,
      stop_when=lambda step: step == stop_at,
      **options,
    )
  except DivergedError as error:
    events.append(("diverged", str(error)))
    events.append(("at", error.step))
  return result, rows, saved, events


@pytest.mark.parametrize(
  ("first", "steps", "log_every", "save_every", "logged", "saved"),
  [
    (0, 10, 4, 3, [4, 8, 10], [3, 6, 9, 10]),
    (6, 10, 4, 3, [8, 10], [9, 10]),
    (0, 5, 1, 100, [1, 2, 3, 4, 5], [5]),
    (0, 6, 3, 6, [3, 6], [6]),
    (0, 7, 100, 2, [7], [2, 4, 6, 7]),
    (10, 10, 1, 1, [], []),
  ],
)
def test_when_it_logs_and_saves(first, steps, log_every, save_every, logged, saved):
  state, _, _ = start(Toy())
  state = dataclasses.replace(state, step=jnp.asarray(first, jnp.int32))
  batches = iter(range(first, 100))
  result, rows, kept, _ = loop(
    counting, state, batches, steps=steps, log_every=log_every, save_every=save_every
  )
  assert list(rows) == logged
  assert list(kept) == saved
  assert int(result.step) == steps
  assert next(batches) == steps  # not one batch more than needed
  for step, row in rows.items():
    assert row["loss"] == step - 1.0  # of that very step, whose batch counts from 0
    assert type(row["loss"]) is float


def test_a_row_is_logged_before_its_state_is_saved():
  state, _, _ = start(Toy())
  options = {"steps": 4, "log_every": 2, "save_every": 2}
  events = loop(counting, state, iter(range(9)), **options)[3]
  assert events == [("log", 2), ("save", 2), ("log", 4), ("save", 4)]


@pytest.mark.parametrize(("stop_at", "logged"), [(3, [2]), (4, [2, 4])])
def test_a_run_that_is_stopped_saves_that_very_step(stop_at, logged):
  state, _, _ = start(Toy())
  batches = iter(range(9))
  result, rows, saved, _ = loop(
    counting, state, batches, steps=8, log_every=2, save_every=100, stop_at=stop_at
  )
  assert int(result.step) == stop_at == next(batches)
  assert list(rows) == logged
  assert list(saved) == [stop_at]


def test_a_gradient_beyond_its_limit_is_divergence():
  state, _, _ = start(Toy())

  def growing(state, batch, key):
    state, scalars = counting(state, batch, key)
    return state, scalars | {"norm_gradient": jnp.float32(2.0) ** batch}

  options = {"steps": 8, "log_every": 1, "save_every": 1, "most_gradient": 5.0}
  *_, saved, events = loop(growing, state, iter(range(9)), **options)
  assert list(saved) == [1, 2, 3]  # norms 1, 2, 4
  assert events[-1] == ("at", 4)
  assert "norm_gradient=8: expected at most train.max_gradient_norm=5.0" in events[-2][1]


def test_continuing_from_a_saved_state_repeats_and_leaves_out_nothing(running):
  step, _, first = running
  options = {"log_every": 1, "save_every": 3}
  whole, all_rows, saved, _ = loop(step, first(), toy_batches(), steps=7, **options)
  structure = jax.tree.structure(whole)
  resumed = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved[3]])
  again, rows, _, _ = loop(step, resumed, toy_batches(3), steps=7, **options)
  assert list(rows) == [4, 5, 6, 7]
  assert rows == {k: all_rows[k] for k in rows}
  for ours, theirs in zip(host(again), host(whole), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def poisoned(step, value):
  """Toy batches; the one of `step` (1 is the first) holds one number that is not finite."""
  for k, batch in enumerate(toy_batches(), start=1):
    yield batch | {"y": batch["y"].at[5, 1].set(value)} if k == step else batch


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
  ("save_every", "log_every", "events"),
  [
    (2, 100, [("save", 2)]),
    (1, 1, [("log", 1), ("save", 1), ("log", 2), ("save", 2)]),
    (5, 5, []),
    (100, 2, [("log", 2)]),
  ],
)
def test_a_state_that_is_not_finite_is_never_saved(running, value, save_every, log_every, events):
  step, _, first = running
  options = {"steps": 20, "log_every": log_every, "save_every": save_every}
  *_, saved, happened = loop(step, first(), poisoned(3, value), **options)
  *before, (kind, message), at = happened
  assert before == events
  assert kind == "diverged"
  assert at == ("at", 3)
  assert message.startswith("step 3: ")
  assert "loss=" in message
  assert "optim.base_rate" in message
  assert "\n" not in message
  for leaves in saved.values():
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_an_absurd_rate_is_noticed_by_its_update():
  task, tx = Toy(), optax.sgd(1e30)
  state, _, mesh = start(task, 1, tx)
  step = compile_step(task, tx, sharding.Layout(mesh))
  options = {"steps": 50, "log_every": 10, "save_every": 1}
  *_, saved, events = loop(step, state, toy_batches(), **options)
  assert events[-2][0] == "diverged"
  assert "norm_update=inf" in events[-2][1]
  assert not saved
