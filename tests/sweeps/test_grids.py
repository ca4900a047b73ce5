"""Grids are data: known fields, distinct cells and names, and the paper's tables."""

import pytest

from byolx.core.config import ConfigError
from byolx.runs import config, schema
from byolx.sweeps import grids

FIELDS = schema.fields()


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_grid_names_fields_and_differs_in_its_labels(name):
  grid = grids.GRIDS[name]
  named = {field for cell in grid.cells for field in cell}
  assert named <= set(FIELDS)
  assert set(grid.per) <= named
  labels = [grids.label(cell) for cell in grid.cells]
  assert len(set(labels)) == len(labels) > 1
  assert all(
    len(text) <= 45 and set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for text in labels
  )


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_cell_of_every_grid_is_a_config_of_its_own(name):
  cells = grids.named(name).cells
  made = [
    config.to_json(config.load("configs/pretrain_imagenet.py", grids.overrides(cell)))
    for cell in cells
  ]
  assert len(set(made)) == len(cells)


def test_table_9_has_its_twelve_networks():
  found = {(cell["model.arch"], cell["model.width"]) for cell in grids.named("table9").cells}
  one = {("resnet50", 1), ("resnet101", 1), ("resnet152", 1), ("resnet200", 1)}
  two = {("resnet50", 2), ("resnet101", 2), ("resnet152", 2), ("resnet200", 2)}
  more = {("resnet50", 3), ("resnet101", 3), ("resnet152", 3), ("resnet50", 4)}
  assert found == one | two | more


def test_table_16_averages_gradients_over_4096_images():
  sizes = [
    config.load("configs/pretrain_imagenet.py:epochs=300", grids.overrides(cell)).train
    for cell in grids.named("table16").cells
  ]
  assert [each.batch_size for each in sizes] == [4096] * 7
  assert [each.micro_batch or 4096 for each in sizes] == [4096, 2048, 1024, 512, 256, 128, 64]


def test_product_takes_every_pair_in_order():
  cells = grids.product(grids.vary("seed", (0, 1)), grids.vary("optim.base_rate", (0.1, 0.2)))
  assert cells == [
    {"seed": 0, "optim.base_rate": 0.1},
    {"seed": 0, "optim.base_rate": 0.2},
    {"seed": 1, "optim.base_rate": 0.1},
    {"seed": 1, "optim.base_rate": 0.2},
  ]
  assert grids.label(cells[1]) == "seed-0-base-rate-0p2"


def test_fields_with_the_same_last_word_keep_their_groups_in_the_name():
  cell = {"views.view1.hue": 0.0, "views.view2.hue": 0.1}
  assert grids.label(cell) == "views-view1-hue-0p0-views-view2-hue-0p1"


def test_an_unknown_grid_and_an_unknown_field_name_the_choices(monkeypatch):
  with pytest.raises(
    ConfigError, match=r"--grid=table99: unknown grid; expected one of table9, seeds"
  ):
    grids.named("table99")
  monkeypatch.setitem(grids.GRIDS, "wrong", grids.Grid([{"optim.speed": 1}]))
  with pytest.raises(ConfigError, match=r"--grid=wrong: unknown field optim.speed"):
    grids.named("wrong")


def test_appendix_d1_has_its_rates_and_epochs():
  cells = grids.GRIDS["semi_supervised"].cells
  assert {cell["optim.base_rate"] for cell in cells} == {0.01, 0.02, 0.05, 0.1, 0.005}
  assert {cell["train.epochs"] for cell in cells} == {30, 50}
  assert len(cells) == 10
  figure = grids.GRIDS["figure4"]
  assert len(figure.cells) == 70
  assert figure.per == ("data.labels",)
  rates = [cell["optim.rates"] for cell in grids.GRIDS["linear_rates"].cells]
  assert rates == [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)]


def test_table_7_regularises_by_both_or_neither():
  pairs = [(c["classify.tclip"], c["classify.logit_penalty"]) for c in grids.GRIDS["table7"].cells]
  assert pairs == [(0, 0), (20, 0.01)] * 2


# Grids that a command spells out


def test_values_have_the_type_of_their_field():
  grid = grids.read(
    ["train.epochs=30,50", "optim.exclude=True,false", "model.arch=resnet18,custom"]
  )
  assert len(grid.cells) == 8
  assert grid.cells[0] == {
    "train.epochs": 30.0,
    "optim.exclude": True,
    "model.arch": "resnet18",
  }
  assert isinstance(grid.cells[0]["train.epochs"], float)
  assert grid.cells[-1] == {"train.epochs": 50.0, "optim.exclude": False, "model.arch": "custom"}


def test_lists_stand_in_brackets():
  cells = grids.read(["model.blocks=(1,2),(3, 4, 5),(6,),()"]).cells
  assert [cell["model.blocks"] for cell in cells] == [(1, 2), (3, 4, 5), (6,), ()]
  labels = [grids.label(cell) for cell in cells]
  assert labels == ["blocks-1-2", "blocks-3-4-5", "blocks-6", "blocks-"]


def test_the_product_of_named_and_spelled_grids_keeps_what_is_studied_apart(monkeypatch):
  apart = grids.Grid(grids.vary("model.width", (1, 2)), per=("model.width",))
  monkeypatch.setitem(grids.GRIDS, "widths", apart)
  grid = grids.read(["widths", "semi_supervised"])
  assert grid.per == ("model.width",)
  assert len(grid.cells) == 20
  assert grid.cells[:2] == [
    {"model.width": 1, "optim.base_rate": 0.01, "train.epochs": 30},
    {"model.width": 1, "optim.base_rate": 0.01, "train.epochs": 50},
  ]


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (
      ["optim.base_rat=1,2"],
      "--grid=optim.base_rat=1,2: unknown field optim.base_rat: did you mean",
    ),
    (["optim.base_rate=1,fast"], "optim.base_rate='fast': expected a number"),
    (["optim.base_rate=1,"], "optim.base_rate='': expected a number"),
    (["optim.base_rate=1,-1"], "optim.base_rate=-1.0: expected a finite number above 0"),
    (["model.blocks=(1,2"], "model.blocks='(1,2': expected values in brackets"),
    (["rate_decay", "optim.base_rate=1"], "optim.base_rate is in --grid=rate_decay as well"),
  ],
)
def test_grids_that_cannot_be(words, said):
  with pytest.raises(ConfigError) as error:
    grids.read(words)
  assert said in str(error.value)
  assert "\n" not in str(error.value)


def test_labels_are_good_for_folders():
  assert grids.label({"init.workdir": "runs/A b", "model.width": -1}) == (
    "workdir-runs-a-b-width--1"
  )
