"""BYOL's pretraining task, recomputed in numpy from what the networks put out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from byolx.data import loader
from byolx.data.augment.distribution import ViewSpec
from byolx.data.sources import small
from byolx.data.transforms import Views
from byolx.models.byol import BYOL, BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.tasks.pretrain import Pretrain
from byolx.training.task import Task

MEAN, STD = (0.2, 0.3, 0.4), (0.3, 0.35, 0.4)
IMAGES = 12


def numpy_init(key, shape, dtype=jnp.float32):
  """Values drawn outside of jax, which would compile a program per shape."""
  seed = np.asarray(jax.random.key_data(key))
  scale = np.prod(shape[:-1]) ** -0.5
  return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), dtype)


ENCODER = ResNetSpec(
  "custom",
  blocks=(1,),
  channels=(8,),
  strides=(2,),
  stem="small",
  stem_channels=4,
  kernel_init=numpy_init,
)
SPEC = BYOLSpec(ENCODER, 6, projector_hidden=10, predictor_hidden=10, classes=10)
TASK = Pretrain(SPEC, steps=100, mean=MEAN, std=STD, tau_base=0.9)
SPECS = (ViewSpec(), ViewSpec(blur_probability=0.1, solarise_probability=0.2))


def digits_batch(placement="host", size=8):
  """A real batch; two of its twelve labels are taken away."""
  source = small.digits("train", test_share=0.2)
  views = Views(SPECS, size, placement)
  with loader.train_batches(source, views, IMAGES, seed=1, prefetch=0) as stream:
    batch = next(stream)
  batch["label"] = batch["label"].copy()
  batch["label"][[2, 7]] = -1
  return batch


def loss_function(tasks, model):
  """batch -> {name: (loss, scalars)}: compiled as one, so that equal work is done once."""
  graphdef, state = nnx.split(model)
  key = jax.random.key(0)

  @jax.jit
  def run(batch):
    merge = lambda: nnx.merge(graphdef, state, copy=True)  # noqa: E731
    return {name: task.loss(merge(), batch, key) for name, task in tasks.items()}

  return run


@pytest.fixture(scope="module")
def model():
  model = TASK.init(nnx.Rngs(0))
  rng = np.random.default_rng(0)
  model.probe.bias.set_value(jnp.asarray(rng.normal(size=10), jnp.float32))
  return model


@pytest.fixture(scope="module")
def batch():
  return digits_batch()


@pytest.fixture(scope="module")
def compute(model):
  """The losses of tasks that share their networks."""
  tasks = {
    "default": TASK,
    "mean": dataclasses.replace(TASK, directions="mean"),
    "weighted": dataclasses.replace(TASK, probe_weight=0.25),
  }
  return loss_function(tasks, model)


@pytest.fixture(scope="module")
def losses(compute, batch):
  without = {name: value for name, value in batch.items() if name != "index"}
  return jax.device_get(compute(without))


@pytest.fixture(scope="module")
def outputs(model, batch):
  """[{y, z, q, target}] of view 1 and view 2, each view sent through the networks on its own."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(x):
    networks = nnx.merge(graphdef, state, copy=True)
    online = networks.online(x, train=True)
    return {
      "y": online.representation,
      "z": online.projection,
      "q": networks.predict(online.projection, train=True),
      "target": networks.target(x, train=True).projection,
    }

  normalised = [
    ((batch[name] / 255.0 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    for name in ("view1", "view2")
  ]
  return [jax.device_get(run(x)) for x in normalised]


def unit(x):
  return x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)


def distance(q, z):
  """2 - 2 cos, per row."""
  return 2 - 2 * np.sum(unit(q) * unit(z), 1)


def test_the_loss_is_the_sum_of_both_directions(losses, outputs):
  first, second = outputs
  one = distance(first["q"], second["target"]).mean()
  other = distance(second["q"], first["target"]).mean()
  assert min(one, other) > 0.5
  loss, scalars = losses["default"]
  assert scalars["loss_byol"] == pytest.approx(one + other, rel=1e-4)
  # Averaged directions would cost 11 points: no tolerance hides half of the loss.
  assert abs(scalars["loss_byol"] - (one + other) / 2) > 0.5
  # Nor is it a view's own target that it is compared with.
  same = distance(first["q"], first["target"]) + distance(second["q"], second["target"])
  assert abs(scalars["loss_byol"] - same.mean()) > 1e-3
  assert loss == scalars["loss"]


def test_the_mean_of_directions_is_an_option(losses):
  whole, half = losses["default"][1], losses["mean"][1]
  assert half["loss_byol"] == pytest.approx(whole["loss_byol"] / 2, rel=1e-6)
  assert half["loss_probe"] == whole["loss_probe"]


def test_the_probe_reads_view_1_and_counts_labelled_images(losses, outputs, model, batch):
  y, labels = outputs[0]["y"].astype(np.float64), batch["label"]
  logits = y @ np.asarray(model.probe.kernel[...]) + np.asarray(model.probe.bias[...])
  known = labels >= 0
  assert known.sum() == IMAGES - 2
  rows = -scipy.special.log_softmax(logits, 1)[np.arange(IMAGES), labels]
  for name, weight in {"default": 1.0, "weighted": 0.25}.items():
    loss, scalars = losses[name]
    assert scalars["loss_probe"] == pytest.approx(rows[known].mean(), rel=1e-4)
    assert loss == pytest.approx(scalars["loss_byol"] + weight * scalars["loss_probe"], rel=1e-6)
    right = (logits.argmax(1) == labels)[known]
    assert scalars["top1"] == pytest.approx(right.mean(), abs=1e-6)


def test_collapse_monitors_are_those_of_view_1(losses, outputs):
  y, z = outputs[0]["y"].astype(np.float64), outputs[0]["z"]
  scalars = losses["default"][1]
  assert scalars["std"] == pytest.approx(unit(z).std(0).mean() * 6**0.5, rel=1e-4)
  eigenvalues = np.linalg.eigvalsh(np.cov(unit(z).T))
  assert scalars["rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-3)
  assert scalars["norm_representation"] == pytest.approx(np.linalg.norm(y, axis=1).mean(), rel=1e-4)
  assert scalars["norm_projection"] == pytest.approx(np.linalg.norm(z, axis=1).mean(), rel=1e-4)


def test_an_unlabelled_batch_has_byols_loss_only_and_stays_finite(compute, batch, losses):
  blank = {name: batch[name] for name in ("view1", "view2")}
  loss, scalars = compute(blank | {"label": np.full(IMAGES, -1, np.int32)})["default"]
  expected = losses["default"][1]["loss_byol"]
  assert float(loss) == pytest.approx(expected, rel=1e-6)
  assert float(scalars["loss_probe"]) == 0.0
  assert all(np.isfinite(float(value)) for value in scalars.values())


def test_without_classes_there_is_no_probe(batch):
  task = dataclasses.replace(TASK, spec=dataclasses.replace(SPEC, classes=0))
  shapes = jax.eval_shape(loss_function({"it": task}, task.init(nnx.Rngs(0))), batch)["it"][1]
  assert set(shapes) == {
    "loss", "loss_byol", "std", "rank", "norm_representation", "norm_projection",
  }  # fmt: skip


# Gradients.


@pytest.fixture(scope="module")
def gradients(model, batch):
  """{scalar: {path: gradient}} of both losses with respect to every parameter, target included."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def run(params, batch):
    def scalars(params):
      networks = nnx.merge(graphdef, params, rest, copy=True)
      found = TASK.loss(networks, batch, jax.random.key(0))[1]
      return found["loss_byol"], found["loss_probe"], found["std"] + found["norm_projection"]

    _, pull = jax.vjp(scalars, params)
    return [pull(tuple(jnp.eye(3)[i]))[0] for i in range(3)]

  names = ("loss_byol", "loss_probe", "monitors")
  return {
    name: {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(found)}
    for name, found in zip(names, run(params, batch), strict=True)
  }


def reached(gradients):
  return {path[0] for path, gradient in gradients.items() if np.any(gradient)}


def test_gradients_reach_what_they_should_and_nothing_else(gradients):
  assert {path[0] for path in gradients["loss_byol"]} == {"online", "predictor", "probe", "target"}
  assert reached(gradients["loss_byol"]) == {"online", "predictor"}
  assert reached(gradients["loss_probe"]) == {"probe"}
  assert reached(gradients["monitors"]) == set()
  for path, gradient in gradients["loss_byol"].items():
    if path[0] in ("online", "predictor") and path[-1] == "kernel":
      assert np.abs(gradient).max() > 1e-4, path


def test_the_probes_gradient_is_the_softmax_regressions(gradients, outputs, model, batch):
  y, labels = outputs[0]["y"].astype(np.float64), batch["label"]
  logits = y @ np.asarray(model.probe.kernel[...]) + np.asarray(model.probe.bias[...])
  error = (scipy.special.softmax(logits, 1) - np.eye(10)[labels]) * (labels >= 0)[:, None]
  error /= (labels >= 0).sum()
  got = gradients["loss_probe"]
  np.testing.assert_allclose(got["probe", "kernel"], y.T @ error, atol=1e-5)
  np.testing.assert_allclose(got["probe", "bias"], error.sum(0), atol=1e-5)


def test_variants_of_table_19_differ_by_the_stopped_gradient(batch):
  """Without a predictor the loss is symmetric: a target with gradient doubles every gradient."""
  bare = dataclasses.replace(SPEC, predictor=False, target="stop_gradient", classes=0)
  stopped = dataclasses.replace(TASK, spec=bare)
  flowing = dataclasses.replace(TASK, spec=dataclasses.replace(bare, target="online"))
  graphdef, params, rest = nnx.split(stopped.init(nnx.Rngs(0)), nnx.Param, ...)

  @jax.jit
  def run(params, batch):
    def loss(params, task):
      networks = nnx.merge(graphdef, params, rest, copy=True)
      return task.loss(networks, batch, jax.random.key(0))[0]

    return [jax.value_and_grad(loss)(params, task) for task in (stopped, flowing)]

  (loss, once), (same_loss, twice) = run(params, batch)
  assert float(loss) == pytest.approx(float(same_loss), rel=1e-6)
  assert float(loss) > 0.1
  largest = 0.0
  for one, two in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
    # A bias in front of a normalisation has no gradient but rounding errors.
    np.testing.assert_allclose(2 * one, two, rtol=1e-3, atol=5e-6)
    largest = max(largest, float(jnp.abs(one).max()))
  assert largest > 1e-2


@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("target", ["ema", "stop_gradient", "online"])
def test_every_variant_of_table_19_can_be_built_and_moved(batch, predictor, target):
  encoder = dataclasses.replace(ENCODER, kernel_init=nnx.initializers.zeros)
  spec = dataclasses.replace(SPEC, encoder=encoder, predictor=predictor, target=target)
  task = dataclasses.replace(TASK, spec=spec)

  def step(batch, step):
    model = task.init(nnx.Rngs(0))
    loss, scalars = task.loss(model, batch, jax.random.key(0))
    return loss, scalars, task.after_update(model, step)

  loss, scalars, moved = jax.eval_shape(step, batch, jnp.int32(0))
  assert loss.shape == scalars["loss_byol"].shape == moved["tau"].shape == ()
  assert loss.dtype == jnp.float32


# After the update, and evaluation.


@pytest.mark.parametrize("statistics", [False, True])
def test_the_target_follows_by_the_tau_of_the_step(statistics):
  task = dataclasses.replace(TASK, average_statistics=statistics)
  model = task.init(nnx.Rngs(1))
  model.online.encoder.stem_norm.mean.set_value(jnp.ones(4))
  before = {
    side: np.asarray(getattr(model, side).projector.output.kernel[...])
    for side in ("online", "target")
  }
  move = nnx.jit(lambda model, step: task.after_update(model, step))
  scalars = move(model, jnp.int32(30))
  tau = 1 - 0.1 * (np.cos(np.pi * 30 / 100) + 1) / 2
  assert float(scalars["tau"]) == pytest.approx(tau, rel=1e-6)
  expected = tau * before["target"] + (1 - tau) * before["online"]
  np.testing.assert_allclose(model.target.projector.output.kernel[...], expected, atol=1e-6)
  np.testing.assert_array_equal(model.online.projector.output.kernel[...], before["online"])
  mean = (1 - tau) if statistics else 0.0
  np.testing.assert_allclose(model.target.encoder.stem_norm.mean[...], mean, rtol=1e-5)


def test_a_constant_tau_holds_at_every_step():
  task = dataclasses.replace(TASK, tau_rule="constant", tau_base=0.0)
  model = task.init(nnx.Rngs(1))
  scalars = nnx.jit(lambda model, step: task.after_update(model, step))(model, jnp.int32(70))
  assert float(scalars["tau"]) == 0.0
  np.testing.assert_allclose(
    model.target.projector.output.kernel[...], model.online.projector.output.kernel[...], atol=1e-7
  )


def test_evaluation_is_the_probe_on_whole_images_in_evaluation_mode(model, batch):
  image, labels = batch["view1"], batch["label"]
  mask = np.arange(IMAGES) < 10
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(image, labels, mask):
    networks = nnx.merge(graphdef, state, copy=True)
    x = ((image / 255.0) - jnp.asarray(MEAN)) / jnp.asarray(STD)
    y = networks.online.encoder(x, train=False)
    found = TASK.evaluate(networks, {"image": image, "label": labels, "mask": mask})
    return y @ networks.probe.kernel[...] + networks.probe.bias[...], found

  logits, found = run(image, labels, mask)
  counted = mask & (labels >= 0)
  assert counted.sum() == 8
  rows = -scipy.special.log_softmax(np.asarray(logits, np.float64), 1)[np.arange(IMAGES), labels]
  values = found.compute()
  assert float(values["loss"]) == pytest.approx(rows[counted].mean(), rel=1e-4)
  right = (np.asarray(logits).argmax(1) == labels)[counted]
  assert float(values["top1"]) == pytest.approx(right.mean(), abs=1e-6)


# Views.


def test_colour_work_on_the_device_gives_the_hosts_loss(model):
  """Both placements see the same draws; 20 pixels are enough for a blur."""
  size = 20
  host, device = digits_batch("host", size), digits_batch("device", size)
  assert (host["index"] == device["index"]).all()
  assert (device["draws1"].sigma > 0).all()
  assert np.abs(host["view1"].astype(int) - device["view1"]).mean() > 10  # there is work to do
  on_device = dataclasses.replace(TASK, views=Views(SPECS, size, "device"))
  run = loss_function({"it": TASK}, model)
  ours = run(host)["it"][1]
  theirs = loss_function({"it": on_device}, model)(device)["it"][1]
  without = run({name: device[name] for name in host})["it"][1]  # crops as they are
  for name in ("loss_byol", "loss_probe"):
    assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-2)
  assert abs(float(ours["loss_byol"]) - float(without["loss_byol"])) > 2e-2


def test_it_is_a_task_and_makes_byols_networks():
  assert isinstance(TASK, Task)
  assert isinstance(TASK.init(nnx.Rngs(0)), BYOL)
