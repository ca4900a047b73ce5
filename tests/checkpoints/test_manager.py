"""Checkpoints: bit-equal on any mesh, those that the policy keeps, never another model's."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from byolx.checkpoints.manager import CheckpointError, Checkpoints, Policy, named
from byolx.core import sharding
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers
from byolx.training.state import abstract_state

COLOURS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
ENCODER = ResNetSpec("custom", blocks=(1, 1), channels=(4, 8), stem="small", stem_channels=4)
HIDDEN = 12


def task_and_optimiser(**changes):
  spec = BYOLSpec(ENCODER, 8, HIDDEN, predictor_hidden=HIDDEN, **{"classes": 10} | changes)
  task = Pretrain(spec, 100, **COLOURS)
  params = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), task.trainable, ...)[1]
  tx = optimizers.lars(lambda k: 0.1, 1e-6, 0.9, 1e-3, optimizers.adapted(params))
  return task, tx


def abstract(devices, **changes):
  task, tx = task_and_optimiser(**changes)
  return abstract_state(task, tx, sharding.Layout(sharding.make_mesh(devices)))


@pytest.fixture(scope="module")
def shapes():
  """{devices: abstract state of one BYOL run}."""
  return {devices: abstract(devices) for devices in (8, 4, 1)}


def fill(shapes, seed):
  """A state with random bits in every array, placed as `shapes` says."""
  rng = np.random.default_rng(seed)

  def one(leaf):
    bits = rng.bytes(max(leaf.size, 1) * leaf.dtype.itemsize)
    value = np.frombuffer(bits, leaf.dtype)[: leaf.size].reshape(leaf.shape)
    return jax.device_put(value, leaf.sharding)

  return jax.tree.map(one, shapes)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def opened(tmp_path):
  """Opens managers of one folder and closes them in the end."""
  managers = []

  def make(**options):
    managers.append(Checkpoints(tmp_path / "run" / "checkpoints", **options))
    return managers[-1]

  yield make
  for manager in managers:
    manager.close()


def spread(shapes, devices):
  """The same shapes, each array's largest axis spread over the mesh where it can be cut."""
  mesh = sharding.make_mesh(devices)

  def one(leaf):
    axis = int(np.argmax(leaf.shape)) if leaf.shape else 0
    cut = leaf.shape and leaf.shape[axis] % devices == 0
    spec = PartitionSpec(*[None] * axis, sharding.DATA) if cut else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(one, shapes)


def test_a_state_is_bit_equal_on_any_other_mesh(opened, shapes):
  """8 -> 4 -> 1 -> 8 devices, replicated and spread in turn; each is saved from where it was put."""
  state = fill(shapes[8], 0)  # random bits: infinities, NaN and denormals among them
  expected = bits(state)
  assert len(set(expected)) > 100
  position = {"next_example": 640, "seed": 3, "source": "digits"}
  targets = [
    shapes[8], spread(shapes[4], 4), shapes[1], spread(shapes[8], 8), shapes[4], shapes[8],
  ]  # fmt: skip
  for step, target in enumerate(targets):
    checkpoints = opened()
    checkpoints.save(step, state, position, {"commit": "abc"})
    checkpoints.wait()
    restored = opened().restore(target)
    assert (restored.step, restored.data, restored.meta) == (step, position, {"commit": "abc"})
    state = restored.state
    assert jax.tree.structure(state) == jax.tree.structure(target)
    assert bits(state) == expected
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target)):
      assert leaf.sharding == wanted.sharding
  cut = [leaf for leaf in jax.tree.leaves(targets[3]) if not leaf.sharding.is_fully_replicated]
  assert len(cut) > 30


def small(value, size=4):
  mesh = sharding.make_mesh(1)
  tree = {"w": jnp.full((size, 2), value, jnp.float32), "step": jnp.int32(value)}
  return jax.device_put(tree, sharding.replicated(mesh))


def shape_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_latest_steps_are_kept(opened):
  checkpoints = opened(policy=Policy(keep=2))
  assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
  for step in (3, 6, 9, 10):
    checkpoints.save(step, small(step), {"next_example": 2 * step}, {})
  checkpoints.wait()
  assert checkpoints.steps() == [9, 10]
  again = opened()
  assert again.latest() == 10
  for step in (9, 10):
    found = again.restore(shape_of(small(0)), step)
    assert float(found.state["w"][0, 0]) == float(found.state["step"]) == step
    assert found.data == {"next_example": 2 * step}
  assert int(again.restore(shape_of(small(0))).state["step"]) == 10
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 6 in .*; saved steps: 9, 10$"):
    again.restore(shape_of(small(0)), 6)


@pytest.mark.parametrize(
  ("policy", "kept"),
  [
    (Policy(keep=1), [12]),
    (Policy(keep=2, keep_every=4), [4, 8, 10, 12]),
    (Policy(keep=1, best="loss"), [4, 12]),
    (Policy(keep=1, best="loss", best_mode="max"), [6, 12]),
    (Policy(keep=1, best="top1", best_mode="max"), [12]),
    (Policy(keep=1, keep_every=6, best="loss"), [4, 6, 12]),
  ],
)
def test_a_policy_keeps_the_latest_milestones_and_the_best(opened, policy, kept):
  losses = {2: float("nan"), 4: 0.25, 6: 3.0, 8: 0.5, 10: float("inf"), 12: 2.0}
  for half in (list(losses)[:3], list(losses)[3:]):  # what was measured outlives the process
    checkpoints = opened(policy=policy)
    for step in half:
      checkpoints.save(step, small(step), {}, {}, {"loss": losses[step]})
    checkpoints.close()
  assert opened().steps() == kept


def test_later_steps_can_be_discarded_and_saved_again(opened):
  checkpoints = opened(policy=Policy(keep=5))
  for step in (2, 4, 6, 8):
    checkpoints.save(step, small(step), {}, {})
  checkpoints.discard_after(4)
  assert checkpoints.steps() == [2, 4]
  checkpoints.save(6, small(60), {}, {})
  checkpoints.wait()
  assert int(checkpoints.restore(shape_of(small(0))).state["step"]) == 60
  assert checkpoints.steps() == [2, 4, 6]


def test_what_is_accepted_is_asked_before_the_arrays_are_looked_at(opened):
  checkpoints = opened()
  checkpoints.save(3, small(3), {"images": 8}, {})
  checkpoints.wait()

  def accept(step, data):
    raise LookupError(f"{step} {data}")

  with pytest.raises(LookupError, match=r"3 \{'images': 8\}"):
    checkpoints.restore({}, accept=accept)


def test_save_says_how_long_the_caller_had_to_wait(opened):
  checkpoints = opened()
  for step in (1, 2):
    began = time.monotonic()
    blocked = checkpoints.save(step, small(step), {}, {})
    assert 0 < blocked <= time.monotonic() - began < blocked + 1


def test_saving_a_step_again_keeps_the_first(opened):
  checkpoints = opened()
  checkpoints.save(5, small(1), {}, {})
  checkpoints.save(5, small(2), {}, {})
  checkpoints.close()
  assert int(opened().restore(shape_of(small(0))).state["step"]) == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_the_arrays_may_be_donated_as_soon_as_save_returns(opened, devices):
  place = sharding.replicated(sharding.make_mesh(devices))
  make = jax.jit(
    lambda: {"large": jnp.arange(2e6, dtype=jnp.float32), "small": jnp.arange(40.0)},
    out_shardings=place,
  )
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree = make()
  overwrite(tree)
  assert tree["large"].is_deleted()  # so it does write into what it is given
  checkpoints, tree = opened(policy=Policy(keep=9)), make()
  like = shape_of(tree)
  for step in range(5):
    checkpoints.save(step, tree, {}, {})
    for _ in range(3):
      tree = overwrite(tree)
  checkpoints.close()
  for step in range(5):
    found = opened().restore(like, step).state
    np.testing.assert_array_equal(found["large"], np.arange(2e6, dtype=np.float32) + 3 * step)
    np.testing.assert_array_equal(found["small"], np.arange(40.0, dtype=np.float32) + 3 * step)


def test_a_save_that_was_cut_off_is_not_there(opened, tmp_path):
  checkpoints = opened()
  checkpoints.save(4, small(4), {"next_example": 8}, {})
  checkpoints.close()
  folder = tmp_path / "run" / "checkpoints"
  # What a killed process leaves: orbax writes into such a folder and renames it when it is whole.
  partial = folder / "9.orbax-checkpoint-tmp"
  shutil.copytree(folder / "4", partial)
  shutil.rmtree(partial / "state")
  again = opened()
  assert again.latest() == 4
  found = again.restore(shape_of(small(0)))
  assert (int(found.state["step"]), found.data) == (4, {"next_example": 8})
  assert partial.is_dir()  # whoever only reads leaves it: it may be somebody's save
  again.save(9, small(9), {}, {})  # and the step can be saved after all
  again.close()
  assert opened().latest() == 9
  assert sorted(path.name for path in folder.iterdir()) == ["4", "9"]


def test_facts_about_the_run_are_kept_in_plain_json(opened, tmp_path):
  checkpoints = opened()
  checkpoints.save(2, small(2), {"next_example": 4}, {"note": "é"}, {"loss": 0.5})
  checkpoints.close()
  path = tmp_path / "run" / "checkpoints" / "2" / "record" / "record.json"
  record = json.loads(path.read_text())["record"]
  assert record["format"] == 1
  assert (record["step"], record["data"], record["meta"]) == (2, {"next_example": 4}, {"note": "é"})
  assert record["metrics"] == {"loss": 0.5}
  assert record["arrays"].keys() == {"w", "step"}
  assert record["arrays"]["w"][0] == "float32[4, 2]"
  assert record["time"].startswith("20")


def test_facts_that_are_not_json_are_refused_at_once(opened):
  with pytest.raises(TypeError, match="not JSON serializable"):
    opened().save(2, small(2), {"seed": np.int64(3)}, {})


@pytest.mark.parametrize(
  ("other", "difference"),
  [
    ({"classes": 0}, "params.probe.bias is float32[10], expected no such array; "),
    ({"classes": 11}, ": params.probe.bias is float32[10], expected float32[11]; "),
    ({"projector_depth": 3}, ".projector.hidden.1.bias is missing, expected float32[12]; "),
    ({"predictor": False}, "predictor.hidden.0.bias is float32[12], expected no such array; "),
  ],
)
def test_another_models_checkpoint_is_refused_by_what_differs(opened, shapes, other, difference):
  checkpoints = opened()
  checkpoints.save(1, fill(shapes[1], 0), {}, {})
  checkpoints.close()
  with pytest.raises(ValueError, match="checkpoint of step 1 holds another model: ") as raised:
    opened().restore(abstract(1, **other))
  message = str(raised.value)
  assert "\n" not in message
  assert difference in message
  assert message.count(" is ") <= 3


def test_another_type_is_refused_and_not_converted(opened):
  checkpoints = opened()
  checkpoints.save(1, small(1), {}, {})
  checkpoints.close()
  like = shape_of(small(0) | {"w": small(0)["w"].astype(jnp.bfloat16)})
  with pytest.raises(ValueError, match=r"w is float32\[4, 2\], expected bfloat16\[4, 2\]"):
    opened().restore(like)


def test_names_are_the_paths_of_the_arrays(shapes):
  state = shapes[1]
  flat = named(state)
  leaves = jax.tree.leaves(state)
  assert len(flat) == len(leaves) > 100
  assert sorted(map(id, flat.values())) == sorted(map(id, leaves))
  for name in (
    "step",
    "params.online.encoder.groups.0.0.convs.1.kernel",
    "params.predictor.hidden.0.bias",
    "params.probe.kernel",
    "rest.online.encoder.stem_norm.mean",
    "rest.target.projector.output.kernel",
    "rest.target.encoder.groups.1.0.shortcut_norm.updates",
  ):
    assert name in flat
  kernel = flat["params.online.encoder.groups.1.0.convs.0.kernel"]
  assert (
    kernel is state.params["online"]["encoder"]["groups"][1][0]["convs"][0]["kernel"].get_value()
  )
  assert not any(name.endswith(".value") for name in flat)
  momenta = [name for name in flat if name.startswith("opt_state") and name.endswith(".kernel")]
  assert len(momenta) == sum(
    name.startswith("params") and name.endswith(".kernel") for name in flat
  )


def test_names_of_optimisers_with_several_moments_do_not_collide():
  params = nnx.State({"a": {"kernel": nnx.Param(jnp.ones(2))}, "value": nnx.Param(jnp.ones(3))})
  tree = {"params": params, "opt": optax.adamw(1e-3).init(params), "value": jnp.zeros(1)}
  assert len(named(tree)) == len(jax.tree.leaves(tree)) == 8
  with pytest.raises(ValueError, match="2 arrays have only 1 different names"):
    named({"a": {"b": 1}, "a.b": 2})


def test_a_folder_is_made_by_the_first_save_only(opened, tmp_path):
  folder = tmp_path / "run" / "checkpoints"
  checkpoints = opened()
  assert (checkpoints.steps(), folder.exists()) == ([], False)
  with pytest.raises(CheckpointError, match=r"^no checkpoint in .*checkpoints$"):
    checkpoints.restore(shape_of(small(0)))
  checkpoints.save(1, small(1), {}, {})
  assert folder.is_dir()
