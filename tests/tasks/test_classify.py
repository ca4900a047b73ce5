"""Classification: losses by numpy, side by side as apart, frozen means frozen, any batch and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from sklearn.datasets import load_digits

from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.evaluation import inference
from byolx.runs import config, trainer
from byolx.training import losses
from byolx.training.state import TrainState, state_shardings
from byolx.training.step import compile_step
from byolx.training.task import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATES = (0.4, 0.3, 0.2, 0.1, 0.05)


def digits(count, start=0):
  """uint8 images [n, 8, 8, 3], labels."""
  images, labels = load_digits(return_X_y=True)
  images = (images.reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8).repeat(3, axis=3)
  return images[start : start + count], labels[start : start + count].astype(np.int32)


def settings(**fields):
  cfg = config.defaults()
  values = {
    "task": "linear",
    "data.validation": "share",
    "views.size": 8,
    "model.arch": "custom",
    "model.blocks": (1, 1),
    "model.channels": (16, 32),
    "model.bottleneck": True,
    "model.stem": "small",
    "model.stem_channels": 8,
    "optim.name": "sgd",
    "optim.weight_decay": 0.0,
    "optim.warmup_epochs": 0.0,
    "train.batch_size": 64,
    "train.epochs": 20.0,
  } | fields
  for name, value in values.items():
    *groups, leaf = name.split(".")
    functools.reduce(lambda node, group: node[group], groups, cfg)[leaf] = value
  config.check(cfg)
  return cfg


def build(devices=1, images=640, classes=10, **fields):
  return trainer.build(settings(**fields), jax.devices()[:devices], images, classes)


def batches(steps, size=64):
  for step in range(steps):
    images, labels = digits(size, start=step * size % 1024)
    yield {"view1": images, "label": labels, "index": np.arange(size, dtype=np.int32)}


def trained(made, steps, warm=True):
  """State after some steps, its encoder's statistics warmed by a forward pass; and the first state."""
  state = made.initialise()
  if warm:
    model = state.model()
    model.encoder(made.normalise(jnp.asarray(digits(256)[0])), train=True)
    graphdef, params, rest = nnx.split(model, made.task.trainable, ...)
    state = TrainState(state.step, params, rest, state.opt_state, graphdef)
    state = jax.device_put(state, state_shardings(made.abstract_state))
  before = jax.tree.map(np.asarray, state)
  step = compile_step(made.task, made.tx, made.layout)
  for batch in batches(steps):
    state, scalars = step(state, sharding.put_batch(batch, made.mesh), made.step_key)
  return state, before, scalars


def test_it_is_a_task():
  assert isinstance(build().task, Task)


# Losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_with_smoothing_is_the_formula(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 5, (7, 10)).astype(np.float32)
  labels = np.array([0, 1, 9, 3, -1, 5, 2])
  target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
  expected = -np.sum(target * scipy.special.log_softmax(logits.astype(np.float64), axis=1), axis=1)
  expected[labels < 0] = 0
  found = jax.jit(functools.partial(losses.cross_entropy, smoothing=smoothing))(logits, labels)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tclip_and_logit_penalty_are_the_formulas():
  logits = np.random.default_rng(1).normal(0, 30, (5, 12)).astype(np.float32)
  clipped = 20 * np.tanh(logits.astype(np.float64) / 20)
  found = jax.jit(lambda x: losses.tclip(x, 20.0))(logits)
  np.testing.assert_allclose(found, clipped, rtol=1e-5, atol=1e-5)
  assert np.abs(found).max() <= 20
  np.testing.assert_array_equal(losses.tclip(jnp.asarray(logits), 0.0), logits)
  penalty = jax.jit(losses.logit_penalty)(logits)
  np.testing.assert_allclose(penalty, np.mean(logits.astype(np.float64) ** 2, axis=1), rtol=1e-5)


def test_the_tasks_loss_is_appendix_d1s():
  made = build(**{"classify.tclip": 20.0, "classify.logit_penalty": 0.01})
  model = made.initialise().model()
  images, labels = digits(32)
  labels[:3] = -1
  y = np.asarray(model.encoder(made.normalise(jnp.asarray(images)), train=False), np.float64)
  x = y @ np.asarray(model.heads.kernel[...][0], np.float64)
  clipped = 20 * np.tanh(x / 20)
  log_p = scipy.special.log_softmax(clipped, axis=1)
  each = -log_p[np.arange(32), labels] + 0.01 * np.mean(clipped**2, axis=1)
  loss, scalars = jax.jit(lambda m, b: made.task.loss(m, b, jax.random.key(0)))(
    model, {"view1": images, "label": labels}
  )
  np.testing.assert_allclose(loss, np.sum(each[3:]) / 29, rtol=1e-5)
  np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-6)


# Side by side


def test_stacked_rates_equal_separate_runs_after_200_steps():
  together, _, scalars = trained(build(devices=4, **{"optim.rates": RATES}), 200)
  for head, rate in enumerate(RATES):
    alone, _, own = trained(build(devices=4, **{"optim.base_rate": rate}), 200)
    for name in ("kernel", "bias"):
      found = np.asarray(together.params["heads"][name][...][head])
      expected = np.asarray(alone.params["heads"][name][...][0])
      assert np.abs(expected).max() > 0.05
      np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(scalars[f"loss_{head}"], own["loss"], atol=1e-5)


def test_all_heads_start_alike_and_end_apart():
  state, before, _ = trained(build(**{"optim.rates": RATES}), 20)
  kernel = before.params["heads"]["kernel"][...]
  assert (kernel == kernel[:1]).all()
  assert kernel.std() > 0.05
  norms = np.linalg.norm(np.asarray(state.params["heads"]["kernel"][...]) - kernel, axis=(1, 2))
  assert (np.diff(norms) < 0).all()  # the larger the rate, the longer the way


@pytest.mark.parametrize("state", ["replicated", "zero", "full"])
def test_any_layout_trains_alike(state):
  made = build(devices=8, **{"optim.rates": (0.4, 0.1), "mesh.state": state})
  alone, _, _ = trained(build(devices=1, **{"optim.rates": (0.4, 0.1)}), 10)
  found, _, _ = trained(made, 10)
  for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(alone.params), strict=True):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


# Frozen


def test_a_frozen_encoder_keeps_every_bit():
  state, before, _ = trained(build(devices=4, **{"optim.rates": (0.4, 0.1)}), 30)
  for one, other in zip(jax.tree.leaves(state.rest), jax.tree.leaves(before.rest), strict=True):
    np.testing.assert_array_equal(np.asarray(one), other)
  assert {path[0] for path, _ in nnx.to_flat_state(state.params)} == {"heads"}


@pytest.mark.parametrize("task", ["finetune", "supervised"])
def test_otherwise_parameters_and_statistics_move(task):
  state, before, scalars = trained(build(task=task, **{"optim.base_rate": 0.4}), 30)
  moved = [
    not np.array_equal(np.asarray(one), other)
    for tree, old in ((state.params, before.params), (state.rest, before.rest))
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(old), strict=True)
  ]
  assert all(moved)
  assert scalars["top1"] > 0.5


# Evaluation


def measured(made, model, size, devices):
  images, labels = digits(1000)
  labels[7] = -1
  short = -len(images) % size
  pad = lambda x, value: np.concatenate([x, np.full((short, *x.shape[1:]), value, x.dtype)])  # noqa: E731
  whole = {
    "image": pad(images, 0),
    "label": pad(labels, -1),
    "mask": pad(np.ones(1000, bool), False),
    "index": pad(np.arange(1000, dtype=np.int32), -1),
  }
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, jax.device_put(state, sharding.replicated(mesh)))
  cut = [
    {name: x[i : i + size] for name, x in whole.items()} for i in range(0, len(whole["mask"]), size)
  ]
  return inference.measure(made.task, model, iter(cut), mesh), inference.predictions(
    made.task, model, iter(cut), mesh
  )


@pytest.fixture(scope="module")
def finished():
  made = build(devices=1, **{"optim.rates": (0.4, 0.1)})
  return made, trained(made, 100)[0].model()


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("size", [7, 16, 1000])
def test_numbers_do_not_depend_on_batch_or_devices(finished, size, devices):
  made, model = finished
  images, labels = digits(1000)
  labels[7] = -1
  y = model.encoder(made.normalise(jnp.asarray(images)), train=False)
  logits = np.asarray(model.heads(y), np.float64)
  own = np.take_along_axis(logits, np.maximum(labels, 0)[:, None, None], axis=2)
  rank = np.sum(logits > own, axis=2)[labels >= 0]
  found, each = measured(made, model, size, devices)
  for k in (1, 5):
    np.testing.assert_array_equal(found[f"top{k}"], np.float32(np.mean(rank < k, axis=0)))
  assert 0.5 < found["top1"].max() < found["top5"].max()
  np.testing.assert_array_equal(each["index"], np.arange(1000))
  np.testing.assert_array_equal(each["label"], labels)
  np.testing.assert_array_equal(each["rank"][labels >= 0], rank)
  np.testing.assert_array_equal(each["classes"][..., 0], np.argmax(logits, axis=2))
  p = scipy.special.softmax(logits, axis=2)
  np.testing.assert_allclose(each["probabilities"], -np.sort(-p, axis=2)[..., :5], atol=1e-5)


# What cannot be


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (
      {"optim.rates": RATES, "task": "finetune"},
      "with task=finetune: several rates are trained in one run on a frozen encoder",
    ),
    ({"optim.rates": RATES, "optim.name": "lars"}, "expected optim.name=sgd"),
    (
      {"optim.rates": RATES, "data.validation": "none"},
      "expected validation images to select the rate",
    ),
    (
      {"classify.views": "randaugment", "views.placement": "device"},
      "expected views.placement=host",
    ),
  ],
)
def test_fields_that_do_not_go_together(fields, said):
  with pytest.raises(ConfigError, match=said):
    build(**fields)


def test_labels_are_needed():
  with pytest.raises(ConfigError, match="have 0 classes; expected labels of at least two"):
    build(classes=0)
