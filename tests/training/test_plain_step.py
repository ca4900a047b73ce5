"""The yardstick of docs/step_speed.py: byolx's train step and the plain one are the same step."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from byolx.core import sharding

SCRIPT = Path(__file__).parents[2] / "docs" / "step_speed.py"

OVERRIDES = (
  "--config.views.size=32",
  "--config.train.batch_size=8",
  "--config.model.arch=custom",
  "--config.model.blocks=(1,2)",
  "--config.model.channels=(16,32)",
  "--config.model.stem_channels=8",
  "--config.byol.projector_hidden=32",
  "--config.byol.predictor_hidden=24",
  "--config.byol.projection_size=16",
  "--config.model.bn_last_scale=1.0",
  "--config.optim.base_rate=0.4",  # at ten times this, rounding soon turns a ReLU on or off
)


@pytest.fixture(scope="module")
def step_speed():
  """The script as a module; it finds its neighbours by itself."""
  spec = importlib.util.spec_from_file_location("step_speed", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(("devices", "bottleneck"), [(1, True), (4, False)])
def test_plain_step_and_library_agree(step_speed, devices, bottleneck):
  batches = [step_speed.photograph_views(8, 32, seed) for seed in range(3)]
  batches[1]["label"][:3] = -1
  overrides = (*OVERRIDES, f"--config.model.bottleneck={bottleneck}")
  library, plain, mesh = step_speed.build(overrides, jax.devices()[:devices], batches[0])
  begin = plain.to_plain(plain.state)
  placed = [sharding.put_batch(batch, mesh) for batch in batches]
  apart = step_speed.disagreement(library, plain, placed)
  assert set(apart) == {"params", "target", "averages", "scalars"}
  assert max(apart.values()) < 1e-4, apart
  kernel = ("params", "online", "encoder", "stem", "kernel")
  first, last = _at(begin, kernel), _at(library.to_plain(library.state), kernel)
  assert np.abs(last - first).max() > 1e-6
  # One step more on one side only, and they no longer agree: the comparison sees a step.
  library.advance(placed[0])
  assert max(step_speed.disagreement(library, plain, placed[:1]).values()) > 0.1


def test_views_are_of_photographs(step_speed):
  batch = step_speed.photograph_views(6, 16)
  assert batch["view1"].shape == batch["view2"].shape == (6, 16, 16, 3)
  assert batch["view1"].dtype == np.uint8
  assert len(np.unique(batch["view1"].reshape(6, -1), axis=0)) == 6
  assert batch["label"].tolist() == [0, 1, 2, 0, 1, 2]


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return np.asarray(tree)
