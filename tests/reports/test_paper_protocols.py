"""Which runs are a number of the paper: the shipped configs are, and no run of another protocol."""

from pathlib import Path

import pytest
from made_runs import FINETUNE, LINEAR, SUPERVISED, fields, record

from byolx.reports import compare
from byolx.reports.measurements import Measurement
from byolx.reports.paper import LEFT_OPEN, TABLES, OneOf, settings
from byolx.runs import config, schema

FIELDS = schema.fields()
ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
CONFIGS = ROOT / "configs"
TASKS = ("linear", "finetune", "supervised")
OTHER_NAMES = {
  "data.validation": "first_10000",
  "data.label_list": "1percent.txt",
  "views.brightness_rule": "multiplicative",
  "model.stem": "small",
  "byol.target": "online",
  "byol.tau_rule": "constant",
  "byol.directions": "mean",
  "init.encoder": "target",
  "classify.views": "pretrain",
  "optim.name": "adamw",
  "optim.schedule": "constant",
  "eval.crop_rule": "reference",
}


def load(name):
  return config.flatten(config.load(str(CONFIGS / name)))


def pretraining(name):
  """What a record says of its encoder's pretraining by a shipped config."""
  return config.changes(load(name))


def result(flat, task="linear", **changes):
  """A result of a run of this flat config."""
  about = {"task": task, "protocol": task, **changes}
  if task == "supervised":
    about |= {"pretrained_on": None, "pretrain": None}
  (one,) = compare.results([Measurement(record(**about), (), flat, None)])
  return one


def tables(one):
  return [(table.number, cell.value) for table, _, cell in compare.in_paper(one)]


def cell_of(task):
  """The condition of Table 8 or 9 for the top-1 of a ResNet-50."""
  table = TABLES["8" if task == "finetune" else "9"]
  row = table.rows[5 if task == "finetune" else 0]
  return table.condition(row, table.columns[2 if task == "supervised" else 0])


def other(name, wanted):
  """A value that a field can have and the paper's protocol does not have."""
  if name in OTHER_NAMES:
    value = OTHER_NAMES[name]
  elif name == "optim.rates":
    value = (7.0,)
  elif isinstance(wanted, OneOf):
    value = 7.0
  elif isinstance(wanted, bool):
    value = not wanted
  elif isinstance(wanted, tuple):
    value = (0.5 * wanted[0], *wanted[1:])
  elif isinstance(wanted, int):
    value = wanted + 64
  else:
    value = 0.5 * wanted or 0.25
  assert FIELDS[name].check(value) is None, f"{name}={value!r}"
  return value


SHIPPED = {
  "linear": load("linear_imagenet.py"),
  "finetune": load("semi_supervised_imagenet.py"),
  "supervised": load("supervised_imagenet.py"),
}
OF_CONFIG = [(task, name) for task in TASKS for name in cell_of(task).config]
OF_PRETRAINING = [(task, name) for task in TASKS[:2] for name in cell_of(task).pretrain]


@pytest.mark.parametrize(("task", "name"), OF_CONFIG)
def test_a_run_that_differs_in_one_field_of_its_protocol_is_no_number(task, name):
  condition = cell_of(task)
  value = "resnet18" if name == "model.arch" else other(name, condition.config[name])
  one = result(SHIPPED[task], task)
  assert compare.matches(condition, one.record, one.config)
  (found,) = compare.departures(condition, one.record, {**one.config, name: value})
  assert (found.field, found.value, found.pretrain) == (name, value, False)


@pytest.mark.parametrize(("task", "name"), OF_PRETRAINING)
def test_an_encoder_that_differs_in_one_field_of_its_pretraining_is_no_number(task, name):
  condition = cell_of(task)
  changes = {**pretraining("pretrain_imagenet.py"), name: other(name, condition.pretrain[name])}
  one = result(SHIPPED[task], task, pretrain=changes)
  (found,) = compare.departures(condition, one.record, one.config)
  assert (found.field, found.value, found.pretrain) == (name, changes[name], True)


@pytest.mark.parametrize(
  ("task", "name"), [(task, name) for task in TASKS for name in LEFT_OPEN[task] if name in FIELDS]
)
def test_a_choice_that_the_paper_leaves_open_is_named(task, name):
  flat = SHIPPED[task]
  assert compare.open_choices(result(flat, task)) == []
  default = LEFT_OPEN[task][name]
  value = {"same": "torch", "one_draw": "retry", "nearest": "bilinear"}.get(default)
  value = value or {"float32": "bfloat16", "normal": "zeros", "uncorrected": "corrected"}.get(
    default
  )
  value = other(name, default) if value is None else value
  one = result({**flat, name: value}, task)
  assert tables(one) == tables(result(flat, task)) != []
  (said,) = compare.open_choices(one)
  assert said.startswith(f"{name}=")


NETWORKS = [
  (row.labels[0].lower().replace("-", ""), int(row.labels[1][0])) for row in TABLES["9"].rows
]
BASELINE = ["14a", "14b", "15a", "15b", "16", "17", "18", "19", "20", "21"]


@pytest.mark.parametrize(("arch", "width"), NETWORKS)
@pytest.mark.parametrize("cores", [0, 512, 128])
def test_the_shipped_configs_are_table_9(arch, width, cores):
  words = f"arch={arch},width={width}"
  origin = pretraining(f"pretrain_imagenet.py:{words},cores={cores}")
  row = next(
    row
    for row in TABLES["9"].rows
    if row.labels[0].lower().replace("-", "") == arch and row.labels[1] == f"{width}×"
  )
  one = result(load(f"linear_imagenet.py:{words}"), pretrain=origin)
  assert ("9", row.cells[0].value) in tables(one)
  one = result(load(f"supervised_imagenet.py:{words}"), "supervised")
  assert tables(one) == [("9", row.cells[2].value)]


@pytest.mark.parametrize(
  ("linear", "origin", "changes", "wanted"),
  [
    ("linear_imagenet.py:views=pretrain", "pretrain_imagenet.py", {}, [("7", 74.4)]),
    ("linear_imagenet.py:tclip=20,penalty=0.01", "pretrain_imagenet.py", {}, [("7", 74.7)]),
    (
      "linear_imagenet.py:views=pretrain,tclip=20,penalty=0.01",
      "pretrain_imagenet.py:cores=32",
      {},
      [("7", 74.8)],
    ),
    (
      "linear_imagenet.py",
      "pretrain_imagenet.py:epochs=300",
      {},
      [(number, 72.5) for number in BASELINE],
    ),
    ("linear_imagenet.py", "pretrain_imagenet_b512.py", {}, [("text", 73.7)]),
    ("linear_imagenet.py", "pretrain_places365.py", {"pretrained_on": "places365"}, [("13", 58.5)]),
    ("linear_places365.py", "pretrain_imagenet.py", {"data": "places365"}, [("13", 51.0)]),
    (
      "linear_places365.py",
      "pretrain_places365.py",
      {"data": "places365", "pretrained_on": "places365"},
      [("13", 53.2)],
    ),
  ],
)
def test_the_shipped_configs_are_the_other_tables(linear, origin, changes, wanted):
  assert tables(result(load(linear), pretrain=pretraining(origin), **changes)) == wanted


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.1, 0.005])
@pytest.mark.parametrize("epochs", [30, 50])
def test_every_cell_of_the_semi_supervised_grid_is_table_8(rate, epochs):
  flat = load(f"semi_supervised_imagenet.py:rate={rate},epochs={epochs}")
  assert tables(result(flat, "finetune")) == [("8", 77.7)]


@pytest.mark.parametrize("rate", [0.4, 0.3, 0.2, 0.1, 0.05])
def test_a_rate_that_a_sweep_chose_for_linear_evaluation_is_table_9(rate):
  assert ("9", 74.3) in tables(result({**SHIPPED["linear"], "optim.rates": (rate,)}))


@pytest.mark.parametrize(
  ("task", "name", "origin", "departures"),
  [
    ("linear", "linear_imagenet.py", "pretrain_imagenet.py:epochs=100", None),
    ("linear", "linear_imagenet.py", "pretrain_imagenet.py:batch=1024", ["train.batch_size"]),
    (
      "linear",
      "linear_imagenet.py:arch=resnet50,width=4",
      "pretrain_imagenet.py:arch=resnet50,width=4,cores=32",
      ["train.micro_batch"],
    ),
    ("supervised", "supervised_imagenet.py:epochs=90", None, ["train.epochs"]),
    ("supervised", "supervised_imagenet.py:views=spatial", None, ["classify.views"]),
    (
      "finetune",
      "semi_supervised_imagenet.py:rate=0.2",
      "pretrain_imagenet.py",
      ["optim.base_rate"],
    ),
  ],
)
def test_shipped_configs_with_other_arguments_are_off_protocol(task, name, origin, departures):
  one = result(load(name), task, pretrain=origin and pretraining(origin))
  assert tables(one) == []
  _, fields = compare.nearest(one)
  assert fields
  if departures:
    assert [each.field for each in fields] == departures


def test_no_number_of_the_paper_is_beside_a_quick_linear_run():
  """One epoch, batch 64, rate 7, no momentum, from an encoder whose statistics saw 64 images."""
  changes = {
    "train.epochs": 1.0, "train.batch_size": 64, "optim.rates": [7.0], "optim.momentum": 0.0
  }  # fmt: skip
  one = result(fields(LINEAR | changes), pretrain={"train.micro_batch": 64})
  assert tables(one) == []
  places, departures = compare.nearest(one)
  assert {table.number for table, _, _ in places} == {"7", "9", "13"}
  assert sorted(map(str, departures)) == [
    "optim.momentum: 0 (paper: 0.9)",
    "optim.rates: (7) (paper: one of (0.4, 0.3, 0.2, 0.1, 0.05), (0.4), (0.3), (0.2), (0.1), (0.05))",
    "pretraining train.micro_batch: 64 (paper: 0)",
    "train.batch_size: 64 (paper: 1024)",
    "train.epochs: 1 (paper: 80)",
  ]


def test_no_number_of_the_paper_is_beside_a_supervised_run_of_six_epochs():
  one = result(fields(SUPERVISED | {"train.epochs": 6.0}), "supervised")
  assert tables(one) == []
  places, departures = compare.nearest(one)
  assert [(table.number, cell.value) for table, _, cell in places] == [("9", 76.4)]
  assert [str(each) for each in departures] == ["train.epochs: 6 (paper: 200)"]


@pytest.mark.parametrize(
  ("made", "task"), [(LINEAR, "linear"), (FINETUNE, "finetune"), (SUPERVISED, "supervised")]
)
def test_the_made_runs_of_the_tests_have_the_protocol_of_the_shipped_configs(made, task):
  assert tables(result(fields(made), task)) == tables(result(SHIPPED[task], task)) != []


@pytest.mark.parametrize(
  "changes",
  [
    {"model.arch": "resnet18"},
    {"model.width": 1.5},
    {"classify.tclip": 20.0, "classify.logit_penalty": 0.0, "classify.views": "randaugment"},
  ],
)
def test_a_run_of_another_row_is_not_listed_below_a_table(changes):
  one = result(fields(LINEAR | changes | {"train.epochs": 1.0}))
  table = TABLES["7"]
  assert not any(
    compare.off_protocol(table, row, column, [one])
    for row in table.rows
    for column in table.columns
  )


def test_half_a_pretraining_is_neither_a_number_nor_off_protocol():
  one = result(SHIPPED["linear"], pretrain_finished=False)
  assert tables(one) == []
  assert compare.nearest(one) == ([], [])


def test_protocols_have_a_value_for_every_choice():
  for protocol in (settings.LINEAR, settings.SEMI_SUPERVISED, settings.SUPERVISED, settings.MAIN):
    for wanted in protocol.values():
      assert not isinstance(wanted, OneOf) or len(wanted.values) > 1
