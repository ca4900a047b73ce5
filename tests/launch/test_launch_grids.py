"""Grids are data: known fields, distinct cells and names, and the paper's tables."""

import grids
import pytest

from byolx import config
from byolx.config import ConfigError


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_cell_of_every_grid_is_a_config_of_its_own(name):
  cells = grids.cells(name)
  made = [
    config.to_json(config.load("configs/pretrain_imagenet.py", grids.overrides(cell)))
    for cell in cells
  ]
  labels = [grids.label(cell) for cell in cells]
  assert len(set(made)) == len(set(labels)) == len(cells) > 1
  assert all(
    len(text) <= 40 and set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for text in labels
  )


def test_table_9_has_its_twelve_networks():
  found = {(cell["model.arch"], cell["model.width"]) for cell in grids.cells("table9")}
  one = {("resnet50", 1), ("resnet101", 1), ("resnet152", 1), ("resnet200", 1)}
  two = {("resnet50", 2), ("resnet101", 2), ("resnet152", 2), ("resnet200", 2)}
  more = {("resnet50", 3), ("resnet101", 3), ("resnet152", 3), ("resnet50", 4)}
  assert found == one | two | more


def test_table_16_averages_gradients_over_4096_images():
  sizes = [
    config.load("configs/pretrain_imagenet.py:epochs=300", grids.overrides(cell)).train
    for cell in grids.cells("table16")
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
    grids.cells("table99")
  monkeypatch.setitem(grids.GRIDS, "wrong", [{"optim.speed": 1}])
  with pytest.raises(ConfigError, match=r"--grid=wrong: unknown field optim.speed"):
    grids.cells("wrong")
