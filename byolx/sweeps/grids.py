"""Grids define the config values that a sweep compares.

A grid is named in `GRIDS` or given on the command line. Each cell of a grid holds the values of the
varied config fields for one run.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from byolx.core.config import ConfigError
from byolx.runs import config, schema

Cell = Mapping[str, Any]
"""One run of a grid: a mapping from names of config fields to their values in this run."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """The settings that a sweep compares. A cell holds the settings of one run.

  Args:
    cells: distinct cells, each a mapping from names of config fields to values.
    per: names of grouping fields. Cells with equal values of these fields form a group. The sweep
      chooses and tests one cell per group. If `per` is empty, all cells form one group.
  """

  cells: Sequence[Cell]
  per: tuple[str, ...] = ()


def vary(name: str, values: Sequence[Any]) -> list[Cell]:
  """Returns a list of cells (mappings from field to value), one for each value of a config field.

  Args:
    name: name of the config field.
    values: values of the field.
  """
  return [{name: value} for value in values]


def product(*grids: Sequence[Cell]) -> list[Cell]:
  """Returns the Cartesian product of grids. The cells of the last grid vary fastest.

  A cell is a mapping from config fields to values.

  Args:
    *grids: cells of each grid. If several grids set the same field, the value of the last grid is
      used.
  """
  cells = []
  for parts in itertools.product(*grids):
    merged: dict[str, Any] = {}
    for part in parts:
      merged |= part
    cells.append(merged)
  return cells


_NETWORKS = (
  ("resnet50", 1), ("resnet101", 1), ("resnet152", 1), ("resnet200", 1),
  ("resnet50", 2), ("resnet101", 2), ("resnet50", 3), ("resnet152", 2),
  ("resnet200", 2), ("resnet50", 4), ("resnet101", 3), ("resnet152", 3),
)  # fmt: skip

# Appendix D.1, semi-supervised: candidates for the choice on the local validation set.
_FINE_TUNING = product(
  vary("optim.base_rate", (0.01, 0.02, 0.05, 0.1, 0.005)), vary("train.epochs", (30, 50))
)

GRIDS: dict[str, Grid] = {
  # Table 9: twelve networks, from small to large. All fit 512 TPU v3 cores (docs/plan.md) with
  # --config=configs/pretrain_imagenet.py:cores=512.
  "table9": Grid([{"model.arch": arch, "model.width": width} for arch, width in _NETWORKS]),
  # The paper's means and intervals are over three seeds.
  "seeds": Grid(vary("seed", (0, 1, 2))),
  # Table 15a, at 300 epochs.
  "table15_rate": Grid(vary("optim.base_rate", (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0))),
  # Table 15b.
  "table15_decay": Grid(vary("optim.weight_decay", (1e-7, 5e-7, 1e-6, 5e-6, 1e-5))),
  # For a new data set: learning rates times weight decays.
  "rate_decay": Grid(
    product(vary("optim.base_rate", (0.1, 0.2, 0.4, 0.8)), vary("optim.weight_decay", (1e-6, 1e-5)))
  ),
  # Table 16: number of images per pass (0: all). Gradients are averaged over 4096 images.
  "table16": Grid(vary("train.micro_batch", (0, 2048, 1024, 512, 256, 128, 64))),
  # Table 14a: layers of projector and predictor.
  "table14_depth": Grid(
    product(vary("byol.projector_depth", (1, 2, 3)), vary("byol.predictor_depth", (1, 2, 3)))
  ),
  # Table 14b.
  "table14_size": Grid(vary("byol.projection_size", (16, 32, 64, 128, 256, 512))),
  # Linear evaluation (appendix D.1) with one rate per run; the shipped configs train all five in one.
  "linear_rates": Grid(vary("optim.rates", ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)))),
  # Fine-tuning (appendix D.1): Table 2, with 1 or 10 % of the labels.
  "semi_supervised": Grid(_FINE_TUNING),
  # Figure 4: fine-tuning at each share of the labels. Figure 5 repeats this for several networks.
  "figure4": Grid(
    product(vary("data.labels", (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)), _FINE_TUNING),
    per=("data.labels",),
  ),
  # Table 7: views times regularisation of the linear evaluation. Each run trains the five rates.
  "table7": Grid(
    product(
      vary("classify.views", ("spatial", "pretrain")),
      [
        {"classify.tclip": tclip, "classify.logit_penalty": penalty}
        for tclip, penalty in ((0, 0), (20, 0.01))
      ],
    ),
    per=("classify.views", "classify.tclip", "classify.logit_penalty"),
  ),
}


def named(name: str) -> Grid:
  """Returns the grid of `GRIDS` with a given name.

  Raises:
    ConfigError: the grid is unknown, or one of its cells has an unknown config field.
  """
  if name not in GRIDS:
    raise ConfigError(f"--grid={name}: unknown grid; expected one of {', '.join(GRIDS)}")
  fields = schema.fields()
  for cell in GRIDS[name].cells:
    if unknown := [field for field in cell if field not in fields]:
      raise ConfigError(
        f"--grid={name}: unknown field {unknown[0]}; `byolx fields` lists the known fields"
      )
  return GRIDS[name]


def read(specs: Sequence[str]) -> Grid:
  """Parses the grids of the command line, and returns their Cartesian product as one grid.

  A grid lists the config values that a sweep compares. The values of the last grid vary fastest.

  Args:
    specs: grids. Each is a name in `GRIDS` or has the form FIELD=VALUE,VALUE,... Values are converted
      to the type of the field. Values that are lists are written in brackets: `(1, 2),(3, 4)`.

  Raises:
    ConfigError: a grid or field is unknown, a value is invalid, or two grids have the same field.
  """
  grids = [_from_values(spec) if "=" in spec else named(spec) for spec in specs]
  spec_of_field: dict[str, str] = {}
  for spec, grid in zip(specs, grids, strict=True):
    fields = dict.fromkeys(field for cell in grid.cells for field in cell)
    if repeated := [field for field in fields if field in spec_of_field]:
      raise ConfigError(
        f"--grid={spec}: {repeated[0]} is in --grid={spec_of_field[repeated[0]]} as well; expected a "
        "field once"
      )
    spec_of_field |= dict.fromkeys(fields, spec)
  return Grid(
    product(*(grid.cells for grid in grids)), tuple(n for grid in grids for n in grid.per)
  )


def _from_values(spec: str) -> Grid:
  name, _, text = spec.partition("=")
  try:
    return Grid(vary(name, [config.value(name, value_text) for value_text in _split(text)]))
  except ConfigError as error:
    raise ConfigError(f"--grid={spec}: {error}") from None


def _split(text: str) -> list[str]:
  """Splits a text at the commas that are not inside brackets."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def label(cell: Cell) -> str:
  """Returns a short name of a cell, such as `arch-resnet200-width-2`.

  The name is made from the cell's fields and values. It has only lower-case letters, digits and
  dashes, so that it can name a folder or a TPU.

  Args:
    cell: mapping from names of config fields to values.
  """
  leaves = [name.rpartition(".")[2] for name in cell]
  names = leaves if len(set(leaves)) == len(leaves) else [name.replace(".", "-") for name in cell]
  parts = [f"{name}-{_value_text(value)}" for name, value in zip(names, cell.values(), strict=True)]
  text = "-".join(parts).lower().replace(".", "p").replace("+", "")
  return re.sub("[^a-z0-9-]", "-", text)


def _value_text(value: Any) -> str:
  return "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def overrides(cell: Cell) -> list[str]:
  """Returns command-line arguments of `byolx train` that set config fields to the values of a cell.

  Args:
    cell: mapping from names of config fields to values.
  """
  return [f"--config.{name}={value}" for name, value in cell.items()]
