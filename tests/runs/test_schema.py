"""Fields of a run: one dataclass declares each of them, and the schema has it as it stands there."""

import dataclasses
import hashlib
import json

import pytest

from byolx import cli
from byolx.core.fields import field, fields_of
from byolx.data.augment.distribution import ViewSpec, ViewsSpec
from byolx.models.byol import BYOLSpec
from byolx.models.resnet import ResNetSpec
from byolx.runs import config, schema
from byolx.tasks import TASKS
from byolx.tasks.pretrain import Pretrain

VIEW = """
  crop_probability crop_area crop_aspect flip_probability jitter_probability brightness contrast
  saturation hue grayscale_probability blur_probability blur_sigma solarise_probability
"""
NAMES = {
  "": "task seed",
  "data": """
    source folder validation validation_share labels labels_seed label_list test_share
    max_failed_share workers threads prefetch
  """,
  "views": "size crop_rule antialias brightness_rule placement mean std",
  "views.view1": VIEW,
  "views.view2": VIEW,
  "model": """
    arch width blocks channels strides bottleneck stem stem_channels padding dilation bn_decay
    bn_eps bn_group bn_debias bn_last_scale kernel_init dtype
  """,
  "byol": """
    projection_size projector_hidden projector_depth predictor_hidden predictor_depth
    output_bias predictor target target_init tau_base tau_rule average_statistics directions
    norm_guard probe_weight
  """,
  "classify": "views tclip logit_penalty label_smoothing head_init",
  "classify.randaugment": "operations magnitude bins interpolation",
  "optim": """
    name base_rate weight_decay momentum trust warmup_epochs rates batch_scaling schedule
    exclude
  """,
  "train": """
    epochs batch_size micro_batch remat max_gradient_norm on_divergence max_rollbacks
  """,
  "init": "workdir encoder inherit like",
  "mesh": "state data fsdp cpu_devices",
  "compile": "cache",
  "checkpoint": "every_epochs every_steps every_minutes keep keep_every best best_mode",
  "log": "every_steps every_seconds",
  "eval": """
    test predictions bootstrap resize crop_rule fractions draws batch_size max_train
  """,
}
"""Names of fields by group, as the first published results had them; a config.json keeps them."""
OLD = [f"{group}.{name}".lstrip(".") for group, names in NAMES.items() for name in names.split()]
FIELDS = schema.fields()
GROUPS = schema.BEFORE_TASKS | schema.AFTER_TASKS
"""Those of no task, each of which can be made from a config alone."""


def group_of(cfg, name):
  return dict(cfg[name]) if name else {each: cfg[each] for each in fields_of(GROUPS[""])}


@pytest.mark.parametrize("name", FIELDS)
def test_a_default_is_what_its_field_takes(name):
  assert FIELDS[name].check(FIELDS[name].default) is None
  assert FIELDS[name].meaning
  assert isinstance(FIELDS[name].default, bool | int | float | str | tuple)


def test_no_field_is_declared_twice():
  of_tasks = {kind.group: kind for kind in TASKS.values()}
  assert len(set(GROUPS.values())) == len(GROUPS)
  assert not GROUPS.keys() & of_tasks.keys()
  assert not fields_of(BYOLSpec).keys() & fields_of(Pretrain).keys()
  names = [(group, name) for group, kind in GROUPS.items() for name in fields_of(kind)]
  names += [(group, name) for group, kind in of_tasks.items() for name in kind.fields()]
  assert len(names) == len(FIELDS)
  assert {f"{group}.{name}".lstrip(".") for group, name in names} == set(FIELDS)


@pytest.mark.parametrize("kind", TASKS.values())
def test_tasks_that_share_a_group_share_its_fields(kind):
  of_group = {name for name in FIELDS if name.startswith(f"{kind.group}.")}
  assert {f"{kind.group}.{name}" for name in kind.fields()} == of_group
  for name, declared in kind.fields().items():
    assert declared.default == FIELDS[f"{kind.group}.{name}"].default


def test_fields_that_runs_were_made_with_are_still_there():
  assert set(OLD) <= set(FIELDS)
  assert len(OLD) == len(set(OLD)) == 132
  flat = {name: FIELDS[name].default for name in OLD}
  assert config.flatten(config.from_json(json.dumps(flat))) == config.flatten(config.defaults())


def test_the_command_prints_them(capsys):
  assert cli.main(["fields"]) == 0
  assert set(OLD) <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_made_from_a_config(group):
  kind, given = GROUPS[group], group_of(config.defaults(), group)
  parts = {
    nested.name: type(nested.default)(**given[nested.name])
    for nested in dataclasses.fields(kind)
    if nested.name in given and dataclasses.is_dataclass(nested.default)
  }
  assert kind(**(given | parts)) == kind()
  assert set(given) == {name.partition(".")[0] for name in fields_of(kind)}


@pytest.mark.parametrize("group", GROUPS)
def test_a_groups_own_defaults_are_those_of_the_schema(group):
  for name, declared in fields_of(GROUPS[group]).items():
    value = GROUPS[group]()
    for part in name.split("."):
      value = getattr(value, part)
    assert value == declared.default == FIELDS[f"{group}.{name}".lstrip(".")].default


def test_the_fields_of_a_task_that_is_added_later_are_there(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Mine(Pretrain):
    group = "mine"
    size: int = field(3, "of mine")

  assert "mine.size" not in schema.fields()
  monkeypatch.setitem(TASKS, "mine", Mine)
  assert schema.fields()["mine.size"].default == config.defaults().mine.size == 3


def test_fields_may_be_changed_by_nobody_else():
  schema.fields().clear()
  assert schema.fields() == FIELDS


OWN_TASK = """
from byolx.tasks import TASKS
from byolx.tasks.pretrain import Pretrain

class Mine(Pretrain):
  {change}

TASKS["mine"] = Mine
"""
CHANGES = (
  "after_update = lambda self, model, step: {}",
  "after_update = lambda self, model, step: {'tau': 0 * step}",
  "trainable = property(lambda self: True)",
  "fields = classmethod(lambda cls: Pretrain.fields())",
)


def test_the_source_of_a_users_task_is_that_of_all_its_classes(monkeypatch, tmp_path):
  """One that inherits its loss is known by what it changes; built-in ones by the package alone."""
  cfg, path = config.defaults(), tmp_path / "mine.py"
  for cfg.task in TASKS:
    assert schema.task_source(cfg) == ""
  monkeypatch.setitem(TASKS, "mine", Pretrain)  # and away afterwards
  found = []
  for change in CHANGES:
    path.write_text(OWN_TASK.replace("{change}", change))
    config.run_file(str(path))
    cfg.task = "mine"
    found.append(schema.task_source(cfg))
    assert hashlib.sha256(path.read_bytes()).hexdigest() in found[-1]
  assert len(set(found)) == len(CHANGES)


def test_the_second_view_differs_in_two_defaults():
  different = {
    name: (FIELDS[f"views.view1.{name}"].default, FIELDS[f"views.view2.{name}"].default)
    for name in fields_of(ViewSpec)
    if FIELDS[f"views.view1.{name}"].default != FIELDS[f"views.view2.{name}"].default
  }
  assert different == {"blur_probability": (1.0, 0.1), "solarise_probability": (0.0, 0.2)}
  assert (ViewsSpec().view1.crop_rule, ViewsSpec().view1.brightness_rule) == (
    "one_draw",
    "additive",
  )


def test_attributes_that_are_no_fields_are_left_out():
  assert "products" not in fields_of(ResNetSpec)
  assert {"crop_rule", "brightness_rule", "randaugment"}.isdisjoint(fields_of(ViewSpec))
