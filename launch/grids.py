"""Named sweeps: what several runs of one config differ in, as {config field: value}, one per run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from byolx.config import ConfigError
from byolx.fields import FIELDS

Cell = Mapping[str, Any]
"""What one run of a grid sets: names of config fields to values."""


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

GRIDS: dict[str, list[Cell]] = {
  # Table 9: the twelve networks, from small to large. All fit 512 TPU v3 cores (docs/plan.md) as
  # --config=configs/pretrain_imagenet.py:cores=512 --grid=table9 has them.
  "table9": [{"model.arch": arch, "model.width": width} for arch, width in _NETWORKS],
  # Means and intervals are over three seeds.
  "seeds": vary("seed", (0, 1, 2)),
  # Table 15a, at 300 epochs.
  "table15_rate": vary("optim.base_rate", (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)),
  # Table 15b.
  "table15_decay": vary("optim.weight_decay", (1e-7, 5e-7, 1e-6, 5e-6, 1e-5)),
  # For a new data set: rates by weight decays.
  "rate_decay": product(
    vary("optim.base_rate", (0.1, 0.2, 0.4, 0.8)), vary("optim.weight_decay", (1e-6, 1e-5))
  ),
  # Table 16: gradients are averaged over 4096 images, normalisation sees this many.
  "table16": vary("train.micro_batch", (0, 2048, 1024, 512, 256, 128, 64)),
  # Table 14a: layers of projector and predictor.
  "table14_depth": product(
    vary("byol.projector_depth", (1, 2, 3)), vary("byol.predictor_depth", (1, 2, 3))
  ),
  # Table 14b.
  "table14_size": vary("byol.projection_size", (16, 32, 64, 128, 256, 512)),
}


def cells(name: str) -> list[Cell]:
  """The cells of a named grid.

  Raises:
    ConfigError: there is no such grid, or a cell names a field that there is not.
  """
  if name not in GRIDS:
    raise ConfigError(f"--grid={name}: unknown grid; expected one of {', '.join(GRIDS)}")
  for cell in GRIDS[name]:
    if unknown := [field for field in cell if field not in FIELDS]:
      raise ConfigError(
        f"--grid={name}: unknown field {unknown[0]}; `byolx fields` lists the known"
      )
  return GRIDS[name]


def label(cell: Cell) -> str:
  """A short name of a cell that is good for folders and TPUs: `arch-resnet200-width-2`."""
  leaves = [name.rpartition(".")[2] for name in cell]
  names = leaves if len(set(leaves)) == len(leaves) else [name.replace(".", "-") for name in cell]
  parts = [f"{name}-{value}" for name, value in zip(names, cell.values(), strict=True)]
  return "-".join(parts).lower().replace("_", "-").replace(".", "p").replace("+", "")


def overrides(cell: Cell) -> list[str]:
  """A cell as arguments of `byolx train`."""
  return [f"--config.{name}={value}" for name, value in cell.items()]
