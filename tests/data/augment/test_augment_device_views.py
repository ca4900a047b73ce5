"""A thousand views of each of the paper's distributions, at 224 pixels: the device's equal the host's
to one grey level."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_sample_images

from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.on_device import apply_device
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.resizing import crop_and_resize

SPECS = {"T": ViewSpec(), "T_prime": ViewSpec(blur_probability=0.1, solarise_probability=0.2)}
LEVELS = 255


@functools.cache
def apply_spread():
  """The device's body on all devices of tests/conftest.py, compiled once."""
  spread = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
  return jax.jit(lambda views, draws: apply_device(views, draws, "additive"), in_shardings=spread)


@pytest.mark.parametrize("name", SPECS)
def test_a_thousand_views_equal_the_hosts(name):
  images = [np.ascontiguousarray(image) for image in load_sample_images().images]
  rng, worst, changes = np.random.default_rng(0), 0.0, []
  for _ in range(25):
    cut, draws, on_host = [], [], []
    for i in range(40):
      image = images[i % 2]
      one = draw(SPECS[name], rng, *image.shape[:2])
      cut.append(crop_and_resize(image, one.crop, 224, antialias=False))
      draws.append(one)
      on_host.append(apply_host(cut[-1], one, "additive"))
    on_device = np.asarray(apply_spread()(np.stack(cut), Draws(*map(np.stack, zip(*draws)))))
    for view, mine, other in zip(cut, on_device, on_host, strict=True):
      worst = max(worst, np.abs(mine * np.float32(LEVELS) - other).max())
      changes.append(np.abs(mine[::8, ::8] * LEVELS - view[::8, ::8]).mean())
  assert worst <= 0.51  # the host's views are rounded
  assert np.mean(changes) > 20
