"""Fields of a run: one dataclass declares each of them, and the schema has it as it stands there."""

import dataclasses
import json

import pytest

from byolx import cli
from byolx.core.fields import field, fields_of
from byolx.data.augment.distribution import Views, ViewSpec
from byolx.models.resnet import ResNetSpec
from byolx.runs import config, schema

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


def group_of(cfg, name):
  return dict(cfg[name]) if name else {each: cfg[each] for each in fields_of(schema.GROUPS[""])}


@pytest.mark.parametrize("name", FIELDS)
def test_a_default_is_what_its_field_takes(name):
  assert FIELDS[name].check(FIELDS[name].default) is None
  assert FIELDS[name].meaning
  assert isinstance(FIELDS[name].default, bool | int | float | str | tuple)


def test_no_field_is_declared_twice():
  assert len(set(schema.GROUPS.values())) == len(schema.GROUPS)
  names = [
    f"{group}.{name}".lstrip(".")
    for group, kind in schema.GROUPS.items()
    for name in fields_of(kind)
  ]
  assert names == list(FIELDS)
  assert len(set(names)) == len(names)


def test_fields_that_runs_were_made_with_are_still_there():
  assert set(OLD) <= set(FIELDS)
  assert len(OLD) == len(set(OLD)) == 132
  flat = {name: FIELDS[name].default for name in OLD}
  assert config.flatten(config.from_json(json.dumps(flat))) == config.flatten(config.defaults())


def test_the_command_prints_them(capsys):
  assert cli.main(["fields"]) == 0
  assert set(OLD) <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("group", schema.GROUPS)
def test_a_group_is_made_from_a_config(group):
  kind, given = schema.GROUPS[group], group_of(config.defaults(), group)
  parts = {
    nested.name: type(nested.default)(**given[nested.name])
    for nested in dataclasses.fields(kind)
    if nested.name in given and dataclasses.is_dataclass(nested.default)
  }
  assert kind(**(given | parts)) == kind()
  assert set(given) == {name.partition(".")[0] for name in fields_of(kind)}


@pytest.mark.parametrize("group", schema.GROUPS)
def test_a_groups_own_defaults_are_those_of_the_schema(group):
  for name, declared in fields_of(schema.GROUPS[group]).items():
    value = schema.GROUPS[group]()
    for part in name.split("."):
      value = getattr(value, part)
    assert value == declared.default == FIELDS[f"{group}.{name}".lstrip(".")].default


def test_a_group_that_is_added_later_is_there(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Mine:
    size: int = field(3, "of mine")

  assert "mine.size" not in schema.fields()
  monkeypatch.setitem(schema.GROUPS, "mine", Mine)
  assert schema.fields()["mine.size"].default == config.defaults().mine.size == 3


def test_fields_may_be_changed_by_nobody_else():
  schema.fields().clear()
  assert schema.fields() == FIELDS


def test_the_second_view_differs_in_two_defaults():
  different = {
    name: (FIELDS[f"views.view1.{name}"].default, FIELDS[f"views.view2.{name}"].default)
    for name in fields_of(ViewSpec)
    if FIELDS[f"views.view1.{name}"].default != FIELDS[f"views.view2.{name}"].default
  }
  assert different == {"blur_probability": (1.0, 0.1), "solarise_probability": (0.0, 0.2)}
  assert (Views().view1.crop_rule, Views().view1.brightness_rule) == ("one_draw", "additive")


def test_attributes_that_are_no_fields_are_left_out():
  assert "products" not in fields_of(ResNetSpec)
  assert {"crop_rule", "brightness_rule", "randaugment"}.isdisjoint(fields_of(ViewSpec))
