"""Checkpoints: bit-equal on any mesh, the newest whole one, never another model's."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from byolx import optim, sharding, train
from byolx.checkpoint import Checkpoints, named
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import STEMS, ResNetSpec
from byolx.tasks.pretrain import Pretrain

COLOURS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
ENCODER = ResNetSpec((1, 1), (4, 8), False, stem=STEMS["small"], stem_channels=4)
HIDDEN = 12


def task_and_optimiser(**changes):
  spec = BYOLSpec(ENCODER, 8, HIDDEN, predictor_hidden=HIDDEN, **{"classes": 10} | changes)
  task = Pretrain(spec, 100, **COLOURS)
  params = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), task.trainable, ...)[1]
  tx = optim.lars(lambda k: 0.1, 1e-6, 0.9, 1e-3, optim.adapted(params))
  return task, tx


def abstract(devices, **changes):
  task, tx = task_and_optimiser(**changes)
  return train.abstract_state(task, tx, jax.random.key(0), sharding.make_mesh(devices))


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


def test_a_state_is_bit_equal_on_any_other_mesh(opened, shapes):
  state = fill(shapes[8], 0)  # random bits: infinities, NaN and denormals among them
  assert len(set(bits(state))) > 100
  position = {"next_example": 640, "seed": 3, "source": "digits"}
  first = opened()
  assert first.latest() is None
  first.save(10, state, position, {"commit": "abc"})
  first.close()
  for devices in (1, 4, 8):
    restored, data = opened().restore(shapes[devices])
    assert data == position
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    for leaf in jax.tree.leaves(restored):
      assert len(leaf.sharding.device_set) == devices
      assert leaf.is_fully_replicated
  # From one device to four as well.
  second = opened()
  second.save(11, restored := opened().restore(shapes[1])[0], position, {})
  second.close()
  again, _ = opened().restore(shapes[4], 11)
  assert bits(again) == bits(restored) == bits(state)


def small(value, size=4):
  mesh = sharding.make_mesh(1)
  tree = {"w": jnp.full((size, 2), value, jnp.float32), "step": jnp.int32(value)}
  return jax.device_put(tree, sharding.replicated(mesh))


def shape_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_latest_steps_are_kept(opened):
  checkpoints = opened(keep=2)
  for step in (3, 6, 9, 10):
    checkpoints.save(step, small(step), {"next_example": 2 * step}, {})
  checkpoints.close()
  again = opened()
  assert again.latest() == 10
  for step in (9, 10):
    state, data = again.restore(shape_of(small(0)), step)
    assert float(state["w"][0, 0]) == float(state["step"]) == step
    assert data == again.data(step) == {"next_example": 2 * step}
  state, _ = again.restore(shape_of(small(0)))
  assert int(state["step"]) == 10
  with pytest.raises(FileNotFoundError):
    again.restore(shape_of(small(0)), 6)


def test_saving_a_step_again_keeps_the_first(opened):
  checkpoints = opened()
  checkpoints.save(5, small(1), {}, {})
  checkpoints.save(5, small(2), {}, {})
  checkpoints.close()
  assert int(opened().restore(shape_of(small(0)))[0]["step"]) == 1


def test_the_arrays_may_be_donated_as_soon_as_save_returns(opened):
  checkpoints = opened()
  big = jax.device_put(
    jnp.arange(3e5, dtype=jnp.float32), sharding.replicated(sharding.make_mesh(8))
  )
  expected, like = np.array(big), shape_of({"w": big})
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  checkpoints.save(1, {"w": big}, {}, {})
  jax.block_until_ready(overwrite(big))
  assert big.is_deleted()
  checkpoints.close()
  np.testing.assert_array_equal(opened().restore(like)[0]["w"], expected)


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
  state, data = again.restore(shape_of(small(0)))
  assert int(state["step"]) == 4
  assert data == {"next_example": 8}
  again.save(9, small(9), {}, {})  # and the step can be saved after all
  again.close()
  assert opened().latest() == 9


def test_facts_about_the_run_are_kept_in_plain_json(opened, tmp_path):
  checkpoints = opened()
  checkpoints.save(2, small(2), {"next_example": 4}, {"commit": "c6887dc", "note": "é"})
  checkpoints.close()
  found = [
    json.loads(path.read_text())
    for path in (tmp_path / "run" / "checkpoints" / "2" / "meta").iterdir()
    if path.is_file() and path.read_text().lstrip().startswith("{")
  ]
  assert {"commit": "c6887dc", "note": "é"} in found


@pytest.mark.parametrize(
  ("other", "difference"),
  [
    ({"classes": 0}, ".probe.bias is float32[10], expected no such array"),
    ({"classes": 11}, " params.probe.bias is float32[10], expected float32[11]"),
    ({"projector_depth": 3}, ".projector.hidden.1.bias is missing, expected float32[12]"),
    ({"predictor": False}, ".predictor.hidden.0.bias is float32[12], expected no such array"),
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
  assert message.endswith(difference)


def test_another_type_is_refused_and_not_converted(opened):
  checkpoints = opened()
  checkpoints.save(1, small(1), {}, {})
  checkpoints.close()
  like = shape_of(small(0) | {"w": small(0)["w"].astype(jnp.bfloat16)})
  with pytest.raises(ValueError, match=r"w is float32\[4, 2\], expected bfloat16\[4, 2\]"):
    opened().restore(like)


def test_names_are_the_paths_of_the_arrays(shapes):
  state = shapes[1]
  flat = {
    ".".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(named(state))[0]
  }
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
  assert len(jax.tree.leaves(named(tree))) == len(jax.tree.leaves(tree)) == 8


def test_a_folder_that_is_missing_is_made(opened, tmp_path):
  opened()
  assert (tmp_path / "run" / "checkpoints").is_dir()
