"""The paper's tables as they were transcribed: sums and marks counted in the appendices, not here."""

import itertools

import pytest

from byolx.reports.paper import (
  MEASURABLE,
  NOT_MEASURABLE,
  OTHER_WORK,
  TABLES,
  Cell,
  Column,
  Condition,
  OneOf,
  Table,
  settings,
)
from byolx.reports.paper.table import NETWORK, row
from byolx.runs import schema

FIELDS = schema.fields()

# Of each table: rows, bold numbers, the sum of every column, the sum of all intervals. Counted by a
# script that read the appendices' own text.
COUNTED = {
  "7": (12, 6, (932.3, 1123.9), 0),
  "8": (6, 4, (463.2, 468.5), 0),
  "9": (12, 5, (935.2, 1126.5, 956.2, 1137.3, 233.2), 0),
  "11": (9, 2, (660.6, 372.0), 0),
  "12": (8, 5, (631.2, 753.9, 785.0, 3.922, 1.22), 0),
  "13": (
    3,
    13,
    (157.2, 189.3, 201.7, 256.6, 205.6, 107.3, 189.3, 162.9, 160.8, 209.3, 215.9, 255.7, 272.0),
    0,
  ),
  "14a": (9, 2, (623.6, 802.9), 0),
  "14b": (6, 2, (431.0, 544.2), 0.3),
  "15a": (7, 2, (457.2, 599.1), 6.2),
  "15b": (5, 2, (357.8, 451.5), 0.7),
  "16": (7, 2, (490.4, 456.7, 626.5, 607.9), 11.1),
  "17": (14, 2, (961.8, 828.8, 1240.0, 1139.2), 3.1),
  "18": (19, 5, (1356.2, 1713.6), 1.0),
  "19": (13, 1, (568.2,), 0),
  "20": (4, 2, (277.7, 353.3), 0.4),
  "21": (6, 0, (273.71,), 1.8),
  "22": (5, 0, (8.2, 44.8, 136.2, 212.4, 268.0), 62.1),
}


def cells(table):
  return [
    (row, column, cell)
    for row in table.rows
    for column, cell in zip(table.columns, row.cells, strict=True)
  ]


def value(number, *labels, column):
  """The one cell of a row that has all these labels."""
  table = TABLES[number]
  (found,) = [one for one in table.rows if set(labels) <= set(one.labels)]
  return found.cells[[c.title for c in table.columns].index(column)]


def conditions():
  return [
    (f"{number}: {row.labels}, {column.title}", table.condition(row, column))
    for number, table in TABLES.items()
    for row, column, _ in cells(table)
    if table.condition(row, column) is not None
  ]


def test_every_table_of_results_is_there():
  assert [*TABLES] == [*COUNTED, "text"]


@pytest.mark.parametrize("number", COUNTED)
def test_a_table_is_what_the_appendices_have(number):
  rows, bold, sums, intervals = COUNTED[number]
  table = TABLES[number]
  assert len(table.rows) == rows
  columns = list(zip(*(row.cells for row in table.rows), strict=True))
  assert [sum(c.value or 0 for c in column) for column in columns] == pytest.approx(sums, abs=1e-9)
  every = list(itertools.chain(*columns))
  assert sum(cell.best for cell in every) == bold
  assert sum(cell.interval or 0 for cell in every) == pytest.approx(intervals)


@pytest.mark.parametrize(
  ("number", "labels", "column", "wanted"),
  [
    ("7", ("ResNet-50 (1×)", "✓"), None, None),
    ("9", ("ResNet-50", "2×"), "BYOL Top-1", Cell(77.4)),
    ("9", ("ResNet-200", "2×"), "BYOL Top-5", Cell(94.9, best=True)),
    ("9", ("ResNet-152", "3×"), "Supervised (ours) Top-1", Cell(80.9, best=True)),
    ("8", ("BYOL",), "Top-1", Cell(77.7, best=True)),
    ("8", ("Supervised [8]",), "Top-5", Cell(None)),
    ("11", ("BYOL (ours)",), "AP50", Cell(77.5, best=True)),
    ("12", ("RelPos [23], by [40]*",), "rms", Cell(0.399, best=True)),
    ("12", ("Supervised-IN [83]",), "rel", Cell(0.127, best=True)),
    ("13", ("BYOL-PL",), "SUN397", Cell(64.2, best=True)),
    ("14b", ("16",), "Top-1", Cell(69.9, 0.3)),
    ("15a", ("0.01",), "Top-5", Cell(60.8, 3.2)),
    ("16", ("256",), "Top-1 SimCLR (repro)", Cell(64.3, 2.1)),
    ("17", ("Remove color (jittering and grayscale)",), "Top-5 BYOL (ours)", Cell(85.3, 0.5)),
    ("18", ("0.5", "0.3"), "Top-5", Cell(91.2, best=True)),
    ("19", ("SimCLR",), "Top-1", Cell(69.4)),
    ("20", ("LayerNorm",), "Top-1", Cell(72.5, 0.4)),
    ("21", ("0",), "Top-1", Cell(0.01)),
    ("22", ("2",), "λ = 2", Cell(15.8, 13.4)),
    ("22", ("10",), "λ = 10", Cell(8.3, 6.8)),
    ("text", ("H",), "Top-1", Cell(73.7)),
    ("text", ("J.2",), "Top-1", Cell(50.3)),
  ],
)
def test_single_numbers(number, labels, column, wanted):
  if column:
    assert value(number, *labels, column=column) == wanted
  else:
    four = [row for row in TABLES[number].rows if labels[0] in row.labels]
    assert [row.labels[1:] for row in four] == [("", ""), ("✓", ""), ("", "✓"), ("✓", "✓")]
    assert [row.cells[0].value for row in four] == [74.3, 74.4, 74.7, 74.8]


def test_every_field_of_a_condition_exists_and_takes_the_value():
  for where, condition in conditions():
    for name, wanted in {**condition.config, **condition.pretrain}.items():
      assert name in FIELDS, f"Table {where}"
      for choice in wanted.values if isinstance(wanted, OneOf) else (wanted,):
        assert FIELDS[name].check(choice) is None, f"Table {where}: {name}={wanted!r}"
        assert type(choice) is type(FIELDS[name].default), f"Table {where}: {name}={wanted!r}"
    assert FIELDS["task"].check(condition.record["task"]) is None, f"Table {where}"


def test_table_9_is_measured_as_appendix_d_says():
  table = TABLES["9"]
  row = next(row for row in table.rows if row.labels[:2] == ("ResNet-50", "2×"))
  network = {"model.arch": "resnet50", "model.width": 2.0}
  byol = table.condition(row, table.columns[0])
  assert byol.record == {
    "task": "linear", "protocol": "linear", "metric": "top1", "split": "test", "labels": 1.0,
    "data": "imagenet", "pretrained_on": "imagenet",
  }  # fmt: skip
  assert byol.config == {**settings.LINEAR, "data.validation": "last_10009", **network}
  assert byol.pretrain["train.epochs"] == 1000
  supervised = table.condition(row, table.columns[3])
  assert supervised.record == {
    "task": "supervised", "protocol": "supervised", "metric": "top5", "split": "test",
    "labels": 1.0, "data": "imagenet",
  }  # fmt: skip
  assert supervised.config == {**settings.SUPERVISED, **network}
  assert table.condition(row, table.columns[4]) is None


PROTOCOLS = {
  "pretrain": settings.MAIN,
  "linear": {**settings.LINEAR, **settings.LOCAL_VALIDATION},
  "finetune": settings.SEMI_SUPERVISED,
  "supervised": settings.SUPERVISED,
}
# Other groups of fields belong to other protocols, or to machines.
GROUPS = ("data", "views", "model", "byol", "classify", "optim", "train", "init", "eval")
OF_RECORDS = {"task", "data.source", "data.labels", "data.label_list", *NETWORK}


@pytest.mark.parametrize("task", PROTOCOLS)
def test_every_field_is_of_the_protocol_or_left_open_or_without_effect(task):
  """A new field that shapes numbers needs a place in the protocols of `settings`."""
  protocol, left_open = PROTOCOLS[task], settings.LEFT_OPEN[task]
  assert not set(protocol) & set(left_open)
  missing = [
    name
    for name, field in FIELDS.items()
    if name.partition(".")[0] in GROUPS
    and name not in {*protocol, *left_open, *OF_RECORDS}
    and not any(name == idle or name.startswith(idle) for idle in settings.WITHOUT_EFFECT[task])
    and not (field.free and not name.startswith("eval."))
    # The variation with the views of pretraining has all fields of the first view.
    and not (task != "pretrain" and name in settings.PRETRAINING_VIEWS)
  ]
  assert missing == []


def test_tables_define_their_rows_by_what_differs_in_them():
  assert TABLES["7"].defining[0] == {
    "model.arch", "model.width", "classify.views", "classify.tclip", "classify.logit_penalty",
  }  # fmt: skip
  assert TABLES["9"].defining == ({"model.arch", "model.width"}, set())
  assert TABLES["15a"].defining[1] == {"optim.base_rate"}
  assert TABLES["21"].defining[1] == {"byol.target"}
  assert TABLES["text"].defining[1] == {
    "train.batch_size", "optim.base_rate", "byol.tau_base"
  }  # fmt: skip


def test_the_main_settings_are_the_defaults_where_the_paper_has_one():
  """Appendix A and Table 6 are this library's defaults too, so a default run is Table 9's first row."""
  table = TABLES["9"]
  condition = table.condition(table.rows[0], table.columns[0])
  for name, wanted in condition.pretrain.items():
    assert FIELDS[name].default == wanted, name


def test_rows_of_an_ablation_differ_from_its_baseline_in_their_own_fields():
  def changed(number, *labels):
    table = TABLES[number]
    (row,) = [row for row in table.rows if row.labels == labels]
    baseline = TABLES["17"].condition(TABLES["17"].rows[0], table.columns[0])
    got = table.condition(row, table.columns[0])
    assert got.record == baseline.record
    assert got.config == baseline.config
    return {k: v for k, v in got.pretrain.items() if baseline.pretrain[k] != v}

  assert changed("14a", "2", "2") == {}
  assert changed("14a", "1", "3") == {"byol.projector_depth": 1, "byol.predictor_depth": 3}
  assert changed("14b", "512") == {"byol.projection_size": 512}
  assert changed("15a", "0.3") == {}
  assert changed("15a", "1") == {"optim.base_rate": 1.0}
  assert changed("15b", "5e-06") == {"optim.weight_decay": 5e-6}
  assert changed("16", "4096") == {}
  assert changed("16", "256") == {"train.micro_batch": 256}
  assert changed("17", "Remove blur in T'") == {"views.view2.blur_probability": 0.0}
  assert changed("17", "Symmetric blurring/solarization") == {
    "views.view1.blur_probability": 0.5,
    "views.view2.blur_probability": 0.5,
    "views.view1.solarise_probability": 0.2,
  }
  kept = {f"views.{v}.jitter_probability": 0.8 for v in ("view1", "view2")}
  only_crops = changed("17", "Crop only")
  assert len(only_crops) == 9
  assert {name.split(".")[2] for name in only_crops} == {
    "flip_probability", "jitter_probability", "grayscale_probability", "blur_probability",
    "solarise_probability",
  }  # fmt: skip
  assert not set(kept) & set(changed("17", "Crop and color only"))
  assert changed("19", "", "✓", "θ", "0") == {"byol.target": "online"}
  assert changed("19", "", "", "ξ", "0") == {"byol.predictor": False}
  assert changed("21", "1") == {"byol.target": "stop_gradient"}


def test_no_two_rows_of_a_table_are_the_same_run():
  for number, table in TABLES.items():
    for column in table.columns:
      found = [c for row in table.rows if (c := table.condition(row, column))]
      assert all(a != b for a, b in itertools.combinations(found, 2)), number


def test_what_cannot_be_measured():
  def status(number, label, column):
    table = TABLES[number]
    row = next(row for row in table.rows if label in row.labels)
    return table.status(row, next(c for c in table.columns if c.title == column))

  assert status("9", "63M", "BYOL Top-1") == MEASURABLE
  assert status("9", "63M", "Supervised [8] Top-1") == OTHER_WORK
  assert status("8", "AutoAugment [87]", "Top-1") == OTHER_WORK
  assert status("8", "SimCLR (repro)", "Top-1") == NOT_MEASURABLE
  assert status("16", "64", "Top-1 SimCLR (repro)") == NOT_MEASURABLE
  assert status("16", "64", "Top-1 BYOL (ours)") == MEASURABLE
  for number in ("11", "12"):
    assert all(TABLES[number].status(r, c) != MEASURABLE for r, c, _ in cells(TABLES[number]))


def test_lower_is_better_for_errors_alone():
  lower = [c.name for t in TABLES.values() for c in t.columns if not c.higher_is_better]
  assert lower == ["rms", "rel"]
  assert [c.unit for c in TABLES["12"].columns] == ["%", "%", "%", "m", ""]


def test_a_row_of_another_length_is_refused():
  rows = (row("a", "b", cells=(1.0,)),)
  with pytest.raises(ValueError, match=r"Table 1, row \('a', 'b'\): 2 labels and 1 cells"):
    Table("1", "", ("one",), (Column("x"),), rows)


def test_conditions_join():
  one = Condition({"task": "linear"}, {"a": 1, "b": 1}, {"c": 1})
  other = Condition({}, {"b": 2}, {}, origin_known=True)
  joined = Condition({"task": "linear"}, {"a": 1, "b": 2}, {"c": 1}, origin_known=True)
  assert one.but(other) == joined
