"""Named sweeps, and those that a command spells out: what several runs of one config differ in."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from byolx.core.config import ConfigError
from byolx.runs import config, schema

Cell = Mapping[str, Any]
"""What one run of a grid sets: names of config fields to values."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """Runs that are compared.

  Args:
    cells: one for each run, all different.
    per: fields whose values are studied apart: each combination of their values gets a selection
      and a test of its own.
  """

  cells: Sequence[Cell]
  per: tuple[str, ...] = ()


def vary(name: str, values: Sequence[Any]) -> list[Cell]:
  """One cell for each value of a field."""
  return [{name: value} for value in values]


def product(*grids: Sequence[Cell]) -> list[Cell]:
  """Every cell of the first grid with every cell of the next; the last one runs fastest."""
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

# Appendix D.1, semi-supervised: chosen on the local validation set.
_FINE_TUNING = product(
  vary("optim.base_rate", (0.01, 0.02, 0.05, 0.1, 0.005)), vary("train.epochs", (30, 50))
)

GRIDS: dict[str, Grid] = {
  # Table 9: the twelve networks, from small to large. All fit 512 TPU v3 cores (docs/plan.md) as
  # --config=configs/pretrain_imagenet.py:cores=512 --grid=table9 has them.
  "table9": Grid([{"model.arch": arch, "model.width": width} for arch, width in _NETWORKS]),
  # Means and intervals are over three seeds.
  "seeds": Grid(vary("seed", (0, 1, 2))),
  # Table 15a, at 300 epochs.
  "table15_rate": Grid(vary("optim.base_rate", (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0))),
  # Table 15b.
  "table15_decay": Grid(vary("optim.weight_decay", (1e-7, 5e-7, 1e-6, 5e-6, 1e-5))),
  # For a new data set: rates by weight decays.
  "rate_decay": Grid(
    product(vary("optim.base_rate", (0.1, 0.2, 0.4, 0.8)), vary("optim.weight_decay", (1e-6, 1e-5)))
  ),
  # Table 16: gradients are averaged over 4096 images, normalisation sees this many.
  "table16": Grid(vary("train.micro_batch", (0, 2048, 1024, 512, 256, 128, 64))),
  # Table 14a: layers of projector and predictor.
  "table14_depth": Grid(
    product(vary("byol.projector_depth", (1, 2, 3)), vary("byol.predictor_depth", (1, 2, 3)))
  ),
  # Table 14b.
  "table14_size": Grid(vary("byol.projection_size", (16, 32, 64, 128, 256, 512))),
  # Appendix D.1, linear evaluation, one rate a run; its configs train the five side by side.
  "linear_rates": Grid(vary("optim.rates", ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)))),
  # Appendix D.1: Table 2 at 1 or 10 % of the labels.
  "semi_supervised": Grid(_FINE_TUNING),
  # Figure 4: the same at every share of the labels. Figure 5 is this for each of several networks.
  "figure4": Grid(
    product(vary("data.labels", (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)), _FINE_TUNING),
    per=("data.labels",),
  ),
  # Table 7: views of the linear evaluation by its regularisation; each run has the five rates.
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
  """A grid by its name.

  Raises:
    ConfigError: there is no such grid, or a cell names a field that there is not.
  """
  if name not in GRIDS:
    raise ConfigError(f"--grid={name}: unknown grid; expected one of {', '.join(GRIDS)}")
  fields = schema.fields()
  for cell in GRIDS[name].cells:
    if unknown := [field for field in cell if field not in fields]:
      raise ConfigError(
        f"--grid={name}: unknown field {unknown[0]}; `byolx fields` lists the known"
      )
  return GRIDS[name]


def read(words: Sequence[str]) -> Grid:
  """The product of grids, each given as NAME or as FIELD=VALUE,VALUE,...; the last runs fastest.

  Values have the field's type; those that are lists stand in brackets: `(1, 2),(3, 4)`.

  Raises:
    ConfigError: unknown grid or field, a value that the field cannot have, a field in two grids.
  """
  grids = [_spelled(word) if "=" in word else named(word) for word in words]
  seen: dict[str, str] = {}
  for word, grid in zip(words, grids, strict=True):
    fields = dict.fromkeys(field for cell in grid.cells for field in cell)
    if twice := [field for field in fields if field in seen]:
      raise ConfigError(
        f"--grid={word}: {twice[0]} is in --grid={seen[twice[0]]} as well; expected a field once"
      )
    seen |= dict.fromkeys(fields, word)
  return Grid(
    product(*(grid.cells for grid in grids)), tuple(n for grid in grids for n in grid.per)
  )


def _spelled(word: str) -> Grid:
  name, _, text = word.partition("=")
  try:
    return Grid(vary(name, [config.value(name, each) for each in _split(text)]))
  except ConfigError as error:
    raise ConfigError(f"--grid={word}: {error}") from None


def _split(text: str) -> list[str]:
  """Between commas, but for those in brackets."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def label(cell: Cell) -> str:
  """A short name of a cell that is good for folders and TPUs: `arch-resnet200-width-2`."""
  leaves = [name.rpartition(".")[2] for name in cell]
  names = leaves if len(set(leaves)) == len(leaves) else [name.replace(".", "-") for name in cell]
  parts = [f"{name}-{_word(value)}" for name, value in zip(names, cell.values(), strict=True)]
  text = "-".join(parts).lower().replace(".", "p").replace("+", "")
  return re.sub("[^a-z0-9-]", "-", text)


def _word(value: Any) -> str:
  return "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def overrides(cell: Cell) -> list[str]:
  """A cell as arguments of `byolx train`."""
  return [f"--config.{name}={value}" for name, value in cell.items()]
