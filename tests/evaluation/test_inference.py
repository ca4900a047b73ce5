"""Evaluation gives the same numbers for any batch size and any mesh; padding never counts."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics
from flax import nnx, struct

from byolx.core import sharding
from byolx.data import loader
from byolx.data.sources import base
from byolx.data.sources.small import digits
from byolx.data.transforms import Centre
from byolx.evaluation import inference
from byolx.models.batch_norm import BatchNorm
from byolx.training import losses
from byolx.training.task import Task

IMAGES = 93
MESHES, BATCHES = (1, 2, 8), (7, 16, 1000)


@struct.dataclass
class Scores(metrics.Collection):
  top1: metrics.Average.from_output("top1")
  loss: metrics.Average.from_output("loss")


class Encoder(nnx.Module):
  """Pixels times random numbers, normalised; in bfloat16 if asked."""

  def __init__(self, seed, group=0, dtype=jnp.float32):
    kernel = np.random.default_rng(seed).normal(size=(8 * 8 * 3, 5))
    self.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    self.norm = BatchNorm(5, group=group, dtype=dtype)
    self.seen = nnx.BatchStat(jnp.zeros((), jnp.int32))

  def __call__(self, x, *, train, views=1):
    if train:
      self.seen.set_value(self.seen[...] + x.shape[0])
    return self.norm(x.reshape(len(x), -1) @ self.kernel[...], train=train, views=views)


@dataclasses.dataclass(frozen=True)
class Classify(Task):
  """Five of the features as logits of five classes."""

  group: ClassVar = "toy"
  trainable: ClassVar = nnx.Param

  def init(self, rngs):
    return Encoder(0)

  def loss(self, model, batch, key):
    raise AssertionError("evaluation has no loss")

  def after_update(self, model, step):
    return {}

  def evaluate(self, model, batch):
    logits = model(unit(batch["image"]), train=False)
    correct = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    loss = losses.cross_entropy(logits, batch["label"])
    return Scores.single_from_model_output(top1=correct, loss=loss, mask=batch["mask"])


def unit(image):
  return image.astype(jnp.float32) / 255.0


@pytest.fixture(scope="module")
def source():
  """93 digits of the classes 0 to 4: a prime times three, no batch size fits."""
  train = digits("train", test_share=0.2)
  return base.Subset(train, np.flatnonzero(train.labels < 5)[:IMAGES])


@pytest.fixture(scope="module")
def by_hand(source):
  """(images, labels, float64 pixels as rows)."""
  images = np.stack([source[i].image for i in range(IMAGES)])
  labels = np.array([source[i].label for i in range(IMAGES)], np.int32)
  return images, labels, images.reshape(IMAGES, -1) / 255.0


@pytest.fixture
def batches(source):
  """batch size -> evaluation batches, the last one padded and masked."""
  opened = []

  def make(batch_size):
    opened.append(loader.evaluation_batches(source, Centre(8, 8, "paper"), batch_size, prefetch=0))
    return opened[-1]

  yield make
  for stream in opened:
    stream.close()


@pytest.mark.parametrize("devices", MESHES)
def test_measures_are_exact_for_any_batch_size_and_mesh(batches, by_hand, devices):
  _, labels, pixels = by_hand
  model = Encoder(3)
  logits = pixels @ np.asarray(model.kernel[...], np.float64) / np.sqrt(1 + 1e-5)
  top1 = np.mean(np.argmax(logits, 1) == labels)
  log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
  loss = np.mean(log_sum - logits[np.arange(IMAGES), labels])
  assert 0.05 < top1 < 0.9
  for batch_size in BATCHES:
    mesh = sharding.make_mesh(devices)
    got = inference.measure(Classify(), model, batches(batch_size), mesh)
    assert got.keys() == {"top1", "loss"}
    assert got["top1"] == pytest.approx(top1, abs=1e-6)
    assert got["loss"] == pytest.approx(loss, rel=1e-5)


def test_masked_rows_do_not_count_whatever_they_hold(by_hand):
  images, labels, _ = by_hand
  batch = {"image": images[:16], "label": labels[:16], "index": np.arange(16, dtype=np.int32)}
  mask = np.arange(16) % 3 > 0
  small = {name: value[mask] for name, value in batch.items()} | {"mask": np.ones(mask.sum(), bool)}
  spoiled = batch["image"].copy()
  spoiled[~mask] = 255 - spoiled[~mask]
  mesh = sharding.make_mesh(2)
  expected = inference.measure(Classify(), Encoder(0), [small], mesh)
  for image in (batch["image"], spoiled):
    got = inference.measure(Classify(), Encoder(0), [batch | {"image": image, "mask": mask}], mesh)
    assert got == pytest.approx(expected, rel=1e-6)
  everything = inference.measure(
    Classify(), Encoder(0), [batch | {"mask": np.ones(16, bool)}], mesh
  )
  assert everything != pytest.approx(expected, rel=1e-3)


def test_no_batches_have_no_measures():
  assert inference.measure(Classify(), Encoder(0), [], sharding.make_mesh(1)) == {}


@pytest.mark.parametrize("devices", MESHES)
def test_features_are_the_same_for_any_batch_size_and_mesh(batches, by_hand, devices):
  images, labels, pixels = by_hand
  encoders = {"first": Encoder(1), "half": Encoder(2, dtype=jnp.bfloat16)}
  before = [np.array(leaf) for leaf in jax.tree.leaves([nnx.state(e) for e in encoders.values()])]
  for batch_size in BATCHES:
    mesh = sharding.make_mesh(devices)
    found, found_labels, indices = inference.features(encoders, unit, batches(batch_size), mesh)
    assert found.keys() == {"first", "half", "pixels"}
    np.testing.assert_array_equal(found_labels, labels)
    np.testing.assert_array_equal(indices, np.arange(IMAGES))
    for name, tolerance in {"first": 1e-4, "half": 0.05}.items():
      expected = pixels @ np.asarray(encoders[name].kernel[...], np.float64) / np.sqrt(1 + 1e-5)
      assert found[name].dtype == np.float32
      np.testing.assert_allclose(found[name], expected, atol=tolerance)
    assert found["pixels"].shape == (IMAGES, 8 * 8 * 3)
    np.testing.assert_array_equal(found["pixels"], images.reshape(IMAGES, -1))
  after = jax.tree.leaves([nnx.state(encoder) for encoder in encoders.values()])
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(old, new)


def test_who_does_not_want_features_gets_none(batches):
  mesh = sharding.make_mesh(2)
  found, labels, indices = inference.features(
    {"a": Encoder(0)}, unit, batches(32), mesh, collect=False
  )
  assert {name: len(rows) for name, rows in found.items()} == {"a": 0, "pixels": 0}
  assert len(labels) == len(indices) == 0


def test_raw_pixels_of_large_images_are_averaged_down():
  rng = np.random.default_rng(0)
  large = rng.integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
  side = inference.PIXELS_SIDE
  means = large.reshape(3, side, 3, side, 3, 3).mean((2, 4))
  got = inference.raw_pixels(large)
  assert got.dtype == np.uint8
  np.testing.assert_allclose(got, means.reshape(3, -1), atol=0.51)
  assert inference.raw_pixels(large[:0]).shape == (0, side * side * 3)
  small = large[:, :side, :side]
  np.testing.assert_array_equal(inference.raw_pixels(small), small.reshape(3, -1))


def averaged(h, parts, group):
  """Debiased running mean and variance: per list of rows one update by the mean over its groups."""
  mean = var = 0.0
  for rows in parts:
    cut = h[rows].reshape(-1, group, h.shape[1])
    mean, var = 0.9 * mean + 0.1 * cut.mean((0, 1)), 0.9 * var + 0.1 * cut.var(1).mean(0)
  weight = 1 - 0.9 ** len(parts)
  return mean / weight, var / weight


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("batch_size", "group"), [(16, 0), (31, 0), (1000, 0), (30, 4), (1000, 5)])
def test_warm_statistics_are_those_of_the_images_and_never_of_padding(
  batches, by_hand, devices, batch_size, group
):
  _, _, pixels = by_hand
  encoder = Encoder(0, group)
  kernel = np.array(encoder.kernel[...])
  inference.warm_statistics(encoder, unit, batches(batch_size), sharding.make_mesh(devices))
  divisor = math.lcm(devices, group or 1)
  used = min(batch_size, IMAGES) // divisor * divisor
  firsts = range(0, max(IMAGES - batch_size + 1, 1), batch_size)
  parts = [np.arange(first, first + used) for first in firsts]
  assert int(encoder.seen[...]) == used * len(parts)
  mean, var = encoder.norm.averages()
  expected = averaged(pixels @ kernel.astype(np.float64), parts, group or used)
  np.testing.assert_allclose(mean, expected[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(var, expected[1], rtol=1e-3)
  np.testing.assert_array_equal(encoder.kernel[...], kernel)


def test_warming_makes_an_encoders_features_standard(batches):
  encoder = Encoder(0)
  raw = functools.partial(inference.features, {"it": encoder}, unit, mesh=sharding.make_mesh(1))
  before = raw(batches=batches(31))[0]["it"]
  inference.warm_statistics(encoder, unit, batches(31), sharding.make_mesh(1))
  after = raw(batches=batches(31))[0]["it"]
  assert np.abs(before.std(0) - 1).max() > 1
  np.testing.assert_allclose(after.std(0), 1, atol=0.2)
  np.testing.assert_allclose(after.mean(0), 0, atol=0.2)
