"""BYOL on digits: one device and eight train alike, by one compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from byolx.core import sharding
from byolx.data import loader
from byolx.data.augment.distribution import ViewSpec
from byolx.data.sources import small
from byolx.data.transforms import Views
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training import optimizers, schedules
from byolx.training.state import new_state
from byolx.training.step import compile_step

KEY = jax.random.key(5)
STEPS, BATCH = 20, 64


def numpy_init(key, shape, dtype=jnp.float32):
  """Values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  scale = np.prod(shape[:-1]) ** -0.5
  return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), dtype)


@pytest.fixture(scope="module")
def byol_runs():
  """{devices: (start, end, scalars of each step, compilations)} of 20 LARS steps on digits."""
  encoder = ResNetSpec(
    "custom",
    blocks=(1,),
    channels=(8,),
    strides=(2,),
    stem="small",
    stem_channels=8,
    kernel_init=numpy_init,
  )
  spec = BYOLSpec(
    encoder, 8, projector_hidden=16, predictor_hidden=16, target_init="online", classes=10
  )
  task = Pretrain(spec, STEPS, mean=(0.3,) * 3, std=(0.35,) * 3, tau_base=0.9)
  params = nnx.split(task.init(nnx.Rngs(0)), task.trainable, ...)[1]
  # At tens of times this rate rounding errors of 1e-7 grow to 1e-2, on one device as on eight.
  rate = schedules.warmup_cosine(0.05, 4, STEPS)
  tx = optimizers.lars(rate, 1e-4, 0.9, 1e-2, optimizers.adapted(params))
  specs = (ViewSpec(), ViewSpec(blur_probability=0.1, solarise_probability=0.2))
  source = small.digits("train", test_share=0.2)
  with loader.train_batches(source, Views(specs, 8), BATCH, seed=0) as stream:
    batches = [next(stream) for _ in range(STEPS)]
  first, runs = jax.device_get(new_state(task, tx, jax.random.key(0))), {}
  for devices in (1, 8):
    mesh = sharding.make_mesh(devices)
    state = jax.device_put(first, sharding.replicated(mesh))
    step, scalars = compile_step(task, tx, sharding.Layout(mesh)), []
    for batch in batches:
      state, logged = step(state, sharding.put_batch(batch, mesh), KEY)
      scalars.append(jax.device_get(logged))
    runs[devices] = first, state, scalars, step._cache_size()
  return runs


def test_eight_devices_train_as_one_does(byol_runs):
  first, one, scalars_of_one, _ = byol_runs[1]
  _, eight, scalars_of_eight, _ = byol_runs[8]
  moved = 0.0
  for part in ("params", "rest"):
    begin, ours, theirs = (nnx.to_flat_state(getattr(s, part)) for s in (first, one, eight))
    for (path, x), (_, a), (_, b) in zip(begin, ours, theirs, strict=True):
      np.testing.assert_allclose(a[...], b[...], atol=1e-5, rtol=1e-5, err_msg=str(path))
      if path[-1] == "kernel":
        moved = max(moved, float(np.abs(np.asarray(a[...]) - x[...]).max()))
  assert moved > 0.02  # thousands of times the tolerance
  for a, b in zip(scalars_of_one, scalars_of_eight, strict=True):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_device_holds_the_same_state(byol_runs):
  for leaf in jax.tree.leaves(byol_runs[8][1]):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == 8
    for shard in shards[1:]:
      np.testing.assert_array_equal(shard, shards[0])


@pytest.mark.parametrize("devices", [1, 8])
def test_byol_compiles_once_and_logs_tau_by_the_step(byol_runs, devices):
  _, state, scalars, compilations = byol_runs[devices]
  assert compilations == 1
  assert int(state.step) == STEPS
  expected = 1 - 0.1 * (np.cos(np.pi * np.arange(STEPS) / STEPS) + 1) / 2
  np.testing.assert_allclose([row["tau"] for row in scalars], expected, rtol=1e-6)


def test_byol_learns_something_on_digits(byol_runs):
  scalars = byol_runs[1][2]
  byol = [float(row["loss_byol"]) for row in scalars]
  assert np.mean(byol[-3:]) < 0.8 * byol[0]
  assert float(scalars[-1]["std"]) > 0.1
