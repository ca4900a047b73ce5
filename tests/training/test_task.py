"""The interface of tasks: what the built-in ones promise, and one with arrays of its own."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics
from flax import nnx, struct
from jax.sharding import NamedSharding
from own_transforms import Colours, Dense, Scalars

import byolx
from byolx import cli
from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.core.fields import between, fields_of
from byolx.data import loader
from byolx.data.augment.distribution import ViewSpec
from byolx.data.transforms import Centre, Transform, Views
from byolx.evaluation import inference
from byolx.models.layers import Linear
from byolx.runs import config, run, schema, trainer
from byolx.runs.images import Sources
from byolx.tasks import TASKS
from byolx.training.step import compile_step
from byolx.training.task import Panel, Setting, Task

KINDS = ("pretrain", "linear", "finetune", "supervised")


def settings(task="pretrain", **fields):
  """A small config of a task."""
  cfg = config.defaults()
  cfg.task = task
  cfg.views.size, cfg.eval.resize = 8, 9
  cfg.model.update({"arch": "custom", "blocks": (1,), "channels": (8,), "stem": "small"})
  cfg.byol.update({"projector_hidden": 16, "predictor_hidden": 16, "projection_size": 8})
  cfg.data.validation = "share"
  for name, value in fields.items():
    group, _, leaf = name.partition("__")
    cfg[group][leaf] = value
  config.check(cfg)
  return cfg


def setting(task="pretrain", classes=10, steps=100, **fields):
  cfg = settings(task, **fields)
  return Setting(cfg, trainer.build_encoder(cfg), classes, steps)


# What a setting says


def test_a_setting_has_the_views_of_the_config():
  cfg = settings(
    views__placement="device", views__antialias=True, views__crop_rule="retry",
    views__brightness_rule="multiplicative", views__mean=(0.1, 0.2, 0.3), views__std=(0.4, 0.5, 0.6),
    eval__crop_rule="reference", eval__antialias=True,
  )  # fmt: skip
  cfg.views.view1.hue = 0.3
  found = Setting(cfg, trainer.build_encoder(cfg), 10, 100)
  rules = {"crop_rule": "retry", "brightness_rule": "multiplicative"}
  first = ViewSpec(hue=0.3, **rules)
  second = ViewSpec(blur_probability=0.1, solarise_probability=0.2, **rules)
  assert found.distributions == (first, second)
  assert found.views(second) == Views((second,), 8, "device", True)
  assert found.centre == Centre(8, 9, "reference", True)
  assert found.colours == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


@pytest.mark.parametrize("placement", ["host", "device"])
def test_pretraining_takes_both_views(placement):
  found = setting(views__placement=placement, byol__tau_base=0.5)
  task = TASKS["pretrain"].build(found)
  views = task.transform("train")
  assert views == Views(found.distributions, 8, placement)
  assert views.specs[0] != views.specs[1]
  assert task.transform("test") == Centre(8, 9)
  assert (task.steps, task.tau_base, task.spec.classes) == (100, 0.5, 10)
  assert TASKS["pretrain"].build(setting(byol__probe_weight=0.0)).spec.classes == 0


@pytest.mark.parametrize("name", KINDS[1:])
def test_classifiers_take_one_view_and_the_fields_of_their_group(name):
  fields = {"tclip": 20.0, "logit_penalty": 0.01, "label_smoothing": 0.1, "head_init": "zeros"}
  found = setting(name, **{f"classify__{field}": value for field, value in fields.items()})
  task = TASKS[name].build(found)
  (spec,) = task.transform("train").specs
  expected = dataclasses.replace(
    ViewSpec(), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0
  )
  assert spec == expected
  assert task.transform("test") == Centre(8, 9)
  assert {field: getattr(task, field) for field in fields} == fields
  assert task.frozen == (name == "linear")
  model = task.init(nnx.Rngs(0))
  assert not np.any(model.heads.kernel[...])
  trained = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, task.trainable))}
  assert trained == ({"heads"} if name == "linear" else {"heads", "encoder"})


def test_a_setting_without_two_classes_makes_no_classifier():
  with pytest.raises(ConfigError, match="have 1 classes; expected labels of at least two"):
    TASKS["linear"].build(setting("linear", classes=1))


# What every task promises


def scalars_of(name, steps=100):
  """Names of all scalars of a step, without computing any."""
  task = TASKS[name].build(setting(name, steps=steps))
  batch = {
    array: jax.ShapeDtypeStruct((4, *declared.shape), declared.dtype)
    for array, declared in task.transform("train").arrays.items()
  } | {"label": jax.ShapeDtypeStruct((4,), np.int32)}

  def step(batch):
    model = task.init(nnx.Rngs(0))
    _, scalars = task.loss(model, batch, jax.random.key(0))
    return scalars | task.after_update(model, jnp.int32(0))

  return set(jax.eval_shape(step, batch)) | {"norm_gradient", "norm_update", "rate"}


@pytest.mark.parametrize("name", KINDS)
def test_panels_draw_scalars_that_are_logged(name):
  logged, panels = scalars_of(name), TASKS[name].curves
  assert "loss" in logged
  for panel in panels:
    assert isinstance(panel, Panel)
    assert 1 <= len(panel.lines) <= 2
    assert {scalar for scalar, _ in panel.lines} <= logged
  titles = [panel.title for panel in panels]
  assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", KINDS)
def test_a_built_in_task_is_a_frozen_dataclass(name):
  kind = TASKS[name]
  task = kind.build(setting(name))
  assert isinstance(task, Task)
  assert isinstance(task.transform("train"), Transform)
  assert isinstance(task.transform("test"), Transform)
  with pytest.raises(dataclasses.FrozenInstanceError):
    task.mean = (0.0, 0.0, 0.0)
  assert kind.fields().keys() == {
    field.removeprefix(f"{kind.group}.")
    for field in schema.fields()
    if field.startswith(f"{kind.group}.")
  }
  for row in task.summary():
    assert len(row) == 2
    assert all(isinstance(part, str) for part in row)


def test_pretraining_warns_of_a_collapse():
  task = TASKS["pretrain"].build(setting())
  assert task.warning({"std": 0.9, "rank": 6.0}) is None
  assert "collapse" in task.warning({"std": 1e-4, "rank": 1.0})
  assert TASKS["linear"].build(setting("linear")).warning({"loss": 1.0}) is None


# A task of one's own


@struct.dataclass
class Errors(metrics.Collection):
  """Mean of the loss of held-out images."""

  error: metrics.Average.from_output("error")


class Net(nnx.Module):
  """A linear layer on six numbers of an image."""

  def __init__(self, rngs):
    self.encoder = Linear(6, 2, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Own(Task):
  """A regression on every array of `Dense`, each of which must come as it was declared."""

  group = "own"
  selects = True

  dense: Dense
  scale: float = byolx.field(1.0, "factor of the loss", between(0, 10))

  @classmethod
  def build(cls, setting):
    return cls(Dense(setting.config.views.size), setting.config.own.scale)

  def init(self, rngs):
    return Net(rngs)

  def transform(self, split):
    return self.dense

  def each(self, model, batch):
    x = jnp.stack(
      [
        batch["picture"].astype(jnp.float32).mean((1, 2, 3)) / 255,
        jnp.where(batch["valid"], batch["depth"], 0).mean((1, 2)),
        batch["turns"] / 30,
        batch["weight"],
        batch["boxes"].corners.mean((1, 2)),
        batch["boxes"].crowd.astype(jnp.float32) - batch["nothing"].sum((1, 2)),
      ],
      axis=1,
    )
    aim = jnp.stack([batch["boxes"].classes.mean(1), batch["place"][:, 0] / 10], axis=1)
    return self.scale * jnp.mean((model.encoder(x) - aim) ** 2, axis=1)

  def loss(self, model, batch, key):
    loss = jnp.mean(self.each(model, batch))
    return loss, {"loss": loss}

  def evaluate(self, model, batch):
    error = self.each(model, batch)
    return Errors.single_from_model_output(error=error, mask=batch["mask"])

  def predict(self, model, batch):
    return {"error": self.each(model, batch), "boxes": batch["boxes"].classes}

  def conclude(self, finished):
    name, images = finished.held_out
    value = inference.measure(self, finished.model, finished.batches(images), finished.mesh)
    facts = finished.facts | {"protocol": "own", "encoder": "online", "labels": 1.0}
    return [{**facts, "split": name, "metric": "error", "value": value["error"], "n": 1}]


class Plain(Own):
  """Its images are numbers only: there is nothing to draw in `views.png`."""

  group = "plain"

  @classmethod
  def build(cls, setting):
    return cls(Scalars(), setting.config.plain.scale)

  def each(self, model, batch):
    x = jnp.stack([batch["grey"] / 255, batch["noise"], *4 * [batch["noise"] ** 2]], axis=1)
    return self.scale * jnp.mean(model.encoder(x) ** 2, axis=1)


@pytest.fixture
def own(monkeypatch):
  """Both are registered, and gone afterwards."""
  monkeypatch.setitem(TASKS, "own", Own)
  monkeypatch.setitem(TASKS, "plain", Plain)
  usual = {
    "train__batch_size": 16, "train__epochs": 3.0, "optim__name": "sgd", "optim__base_rate": 0.1,
    "optim__warmup_epochs": 0.5, "optim__batch_scaling": False, "optim__weight_decay": 0.0,
  }  # fmt: skip
  return lambda task="own", **fields: settings(task, **(usual | fields))


def built(cfg, devices, images=40):
  return trainer.build(cfg, jax.devices()[:devices], images, 3)


def test_what_a_task_does_not_say_has_a_usual_answer():
  class Bare(Task):
    group = "bare"

  bare = Bare()
  assert isinstance(bare, Task)
  assert (bare.trainable, bare.frozen) == (nnx.Param, False)
  assert bare.after_update(Net(nnx.Rngs(0)), jnp.int32(0)) == {}
  assert bare.warning({"loss": math.inf}) is None
  assert bare.summary() == ()
  assert (Bare.needs_labels, Bare.selects, Bare.own_size, Bare.parallel_rates) == (False,) * 4
  assert [panel.lines for panel in Bare.curves] == [(("loss", ""),), (("rate", ""),)]
  Bare.check(config.defaults())
  records = [
    {"protocol": "bare", "split": split, "metric": "error", "value": value}
    for split, value in (("validation", 0.123456), ("test", 12.0))
  ]
  head, one, other = Bare.table(records).splitlines()
  assert head.split() == ["protocol", "split", "metric", "value"]
  assert one.split() == ["bare", "validation", "error", "0.1235"]
  assert other.split() == ["bare", "test", "error", "12"]
  assert not isinstance(object(), Task)


def test_its_group_is_its_dataclass(own):
  assert set(Own.fields()) == {"scale"} == set(fields_of(Own))
  cfg = own()
  assert cfg.own.scale == 1.0
  cfg.own.scale = 2.5
  assert built(cfg, 1).task == Own(Dense(8), 2.5)
  cfg.own.scale = 11.0
  with pytest.raises(ConfigError, match=r"own\.scale=11\.0: expected a number from 0 to 10"):
    config.check(cfg)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_step_is_compiled_for_the_very_batches_that_the_input_makes(own, devices):
  made = built(own(optim__warmup_epochs=0.0), devices)
  with loader.train_batches(Colours(40), made.task.transform("train"), 16, 0) as batches:
    batch = sharding.put_batch(next(batches), made.mesh)
  expected = made.abstract_batch()
  assert jax.tree.structure(batch) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert isinstance(other.sharding, NamedSharding)
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
  state = made.initialise()
  before = np.array(state.params["encoder"]["kernel"][...])
  state, scalars = made.lower().compile()(state, batch, made.step_key)
  assert np.isfinite(float(scalars["loss"]))
  assert np.abs(np.asarray(state.params["encoder"]["kernel"][...]) - before).max() > 1e-4


def test_micro_batches_of_any_array_are_the_same_step(own):
  made = built(own(), 2)
  with loader.train_batches(Colours(40), made.task.transform("train"), 16, 0) as batches:
    batch = sharding.put_batch(next(batches), made.mesh)
  found = []
  for passes in (1, 4):
    step = compile_step(made.task, optax.sgd(0.5), made.layout, passes=passes)
    state = dataclasses.replace(
      made.initialise(), opt_state=optax.sgd(0.5).init(made.initialise().params)
    )
    state, scalars = step(state, batch, made.step_key)
    found.append([float(scalars["loss"]), *map(np.asarray, jax.tree.leaves(state.params))])
  for one, other in zip(*found, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 8, 40])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_evaluation_takes_arrays_of_any_kind_and_never_counts_padding(own, rows, devices):
  """Five rows are padded to a multiple of the devices once more."""
  made = built(own(), 1)
  model, source = made.initialise().model(), Colours(19, frozenset({3}))
  with loader.evaluation_batches(source, made.task.transform("test"), 19) as batches:
    whole = next(batches)
  known = whole["mask"]
  assert known.sum() == 18
  expected = np.asarray(made.task.each(model, jax.tree.map(jnp.asarray, whole)))[known]
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  graphdef, state = nnx.split(model)
  model = nnx.merge(graphdef, jax.device_put(state, sharding.replicated(mesh)))
  batches = lambda: loader.evaluation_batches(  # noqa: E731
    source, made.task.transform("test"), rows, max_failed_share=1.0
  )
  found = inference.measure(made.task, model, batches(), mesh)
  assert found == {"error": pytest.approx(expected.mean(), rel=1e-5)}
  each = inference.predictions(made.task, model, batches(), mesh)
  np.testing.assert_array_equal(each["index"], np.flatnonzero(known))
  np.testing.assert_array_equal(each["label"], np.flatnonzero(known) % 3)
  np.testing.assert_allclose(each["error"], expected, rtol=1e-5)
  np.testing.assert_array_equal(each["boxes"], whole["boxes"].classes[known])


@pytest.mark.parametrize(("task", "drawn"), [("own", True), ("plain", False)])
def test_a_run_from_views_to_records(own, tmp_path, capsys, task, drawn):
  """Also without a picture among its arrays: then there is no views.png."""
  images = Sources(Colours(40), Colours(17), None)
  cfg = own(task, eval__batch_size=8, mesh__data=2)
  records = run.train_run(cfg, tmp_path / "run", images=images)
  (record,) = records
  assert json.loads((tmp_path / "run" / "results.json").read_text()) == records
  assert (record["task"], record["split"], record["metric"]) == (task, "validation", "error")
  assert 0 < record["value"] < 100
  assert (tmp_path / "run" / "views.png").exists() == drawn
  assert (tmp_path / "run" / "curves.png").exists()
  said = capsys.readouterr().out
  assert f"own       validation  error   {record['value']:.4g}" in said


def test_the_picture_of_a_transform_with_other_arrays_too(own, tmp_path):
  cfg = own()
  assert run.write_views(cfg, Dense(8), Colours(40), tmp_path / "dense.png", 2, 3)
  assert (tmp_path / "dense.png").stat().st_size > 100
  assert not run.write_views(cfg, Scalars(), Colours(40), tmp_path / "none.png")
  assert not (tmp_path / "none.png").exists()


FILE = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({"task": "plain", "views": {"size": 8}, "eval": {"resize": 8}})
"""


def test_the_command_says_that_there_is_no_picture(own, tmp_path, capsys):
  (tmp_path / "plain.py").write_text(FILE)
  words = ["show-views", f"--config={tmp_path}/plain.py", f"--output={tmp_path}/views.png"]
  assert cli.main(words) == 2
  said = capsys.readouterr().err
  assert "task=plain: its training transform has no picture; expected a uint8 array" in said
  assert not (tmp_path / "views.png").exists()
