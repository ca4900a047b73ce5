"""What a sweep compares, chooses and tests: its cells, their runs, and the runs of those chosen.

Appendix D.1: what a grid varies is chosen by a validation set that is apart from training and test
images; what was chosen is trained with several seeds, on training and validation images together where
the protocol says so (E.2, E.3), and tested once.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from byolx.core.config import ConfigError, flatten
from byolx.runs import results, schema
from byolx.runs.config import load
from byolx.sweeps import grids, selection
from byolx.sweeps.jobs import Run
from byolx.sweeps.selection import By
from byolx.tasks import TASKS

ALL = "all"
"""The group of all cells, where none are studied apart."""

LONGEST_LABEL = 200


@dataclasses.dataclass(frozen=True)
class Cell:
  """One candidate: what it sets, with values of the fields' types, and its whole config."""

  label: str
  fields: dict[str, Any]
  config: ConfigDict
  group: str


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a command asks for; see `build`."""

  config: str
  overrides: tuple[str, ...]
  workdir: Path
  cells: tuple[Cell, ...]
  per: tuple[str, ...]
  by: By
  seeds: tuple[int, ...]
  retrain: bool
  base: ConfigDict

  @property
  def groups(self) -> dict[str, list[Cell]]:
    """Cells that are compared with each other, in the order of the grid."""
    groups: dict[str, list[Cell]] = {}
    for cell in self.cells:
      groups.setdefault(cell.group, []).append(cell)
    return groups


@dataclasses.dataclass(frozen=True)
class Choice:
  """The cell of a group that is best on validation images, and what all of them reached."""

  cell: Cell
  record: results.Record
  validation: dict[str, float]
  edges: list[str]


def build(
  path: str,
  overrides: Sequence[str],
  words: Sequence[str],
  workdir: Path,
  *,
  per: Sequence[str] = (),
  by: By = selection.TOP1,
  seeds: Sequence[int] = (),
  retrain: bool = False,
) -> Sweep:
  """Every cell of a sweep with its config, none of them run.

  Args:
    path: config, FILE[:ARGS].
    overrides: `--config.FIELD=VALUE`.
    words: grids, NAME or FIELD=VALUE,...; their product is run.
    workdir: of the sweep.
    per: fields that are studied apart, besides those of named grids.
    by: what is compared.
    seeds: of the test; none: the config's.
    retrain: test what was trained on training and validation images together.

  Raises:
    ConfigError: an unknown field, or configs that cannot be or are no different.
  """
  grid = grids.read(words)
  per = tuple(dict.fromkeys([*grid.per, *per]))
  varied = list(dict.fromkeys(name for cell in grid.cells for name in cell))
  given = [override.removeprefix("--config.").partition("=")[0] for override in overrides]
  if "seed" in varied:
    raise ConfigError("--grid: seed is nothing to choose; expected --seeds, of the tests")
  if "eval.test" in [*varied, *given]:
    raise ConfigError("eval.test is set by the sweep, which tests the chosen cells alone")
  if unknown := [name for name in per if name not in varied]:
    raise ConfigError(f"--per={unknown[0]}: expected a field of the grid: {', '.join(varied)}")
  cells = tuple(_cell(path, overrides, fields, per) for fields in grid.cells)
  base = load(path, overrides)
  for cell in cells:
    _check_cell(cell.config, varied, by, retrain)
  _check_labels(cells, per)
  return Sweep(
    path, tuple(overrides), workdir, cells, per, by, tuple(seeds) or (base.seed,), retrain, base
  )


def _check_cell(cell: ConfigDict, varied: Sequence[str], by: By, retrain: bool) -> None:
  """Refuses what would be found out only after the cells have run."""
  kind = TASKS[cell.task]
  if not (kind.selects or retrain):
    raise ConfigError(
      f"task={cell.task}: a run with validation images is measured on these; expected --retrain, which "
      "tests what was trained on all training images"
    )
  if kind.record_keys and {key for key, _ in by.only} != set(kind.record_keys):
    raise ConfigError(
      f"--select={by}: a run of task={cell.task} has several records of a metric; expected values of "
      f"{', '.join(kind.record_keys)}, such as --select=top1:protocol=linear,encoder=online,labels=1.0"
    )
  if retrain and (cell.data.labels < 1 or cell.data.label_list):
    raise ConfigError(
      f"--retrain with data.labels={cell.data.labels}, data.label_list={cell.data.label_list!r}: as many "
      "labels are trained on with validation images as without; expected no --retrain"
    )
  if "optim.base_rate" in varied and cell.optim.rates:
    raise ConfigError(
      f"--grid: optim.base_rate has no meaning beside optim.rates={tuple(cell.optim.rates)}; expected "
      "optim.rates in the grid, or --config.optim.rates=()"
    )


def _check_labels(cells: Sequence[Cell], per: Sequence[str]) -> None:
  """Labels are folders: those of cells differ, and those of groups where the groups do."""
  labels = [cell.label for cell in cells]
  if twice := [label for label in labels if labels.count(label) > 1]:
    raise ConfigError(f"--grid: two cells are called {twice[0]}; expected different cells")
  groups: dict[str, tuple] = {}
  for cell in cells:
    values = tuple(flatten(cell.config)[name] for name in per)
    if groups.setdefault(cell.group, values) != values:
      raise ConfigError(f"--per: two groups are called {cell.group}; expected different names")
  longest = max(labels, key=len)
  if len(longest) > LONGEST_LABEL:
    raise ConfigError(f"--grid: {longest}: expected a name of at most {LONGEST_LABEL} letters")


def _cell(path: str, overrides: Sequence[str], fields: grids.Cell, per: Sequence[str]) -> Cell:
  made = load(path, [*overrides, *grids.overrides(fields), "--config.eval.test=False"])
  if made.data.validation == "none":
    raise ConfigError(
      "data.validation='none': expected validation images, which the sweep chooses by"
    )
  flat = flatten(made)
  fields = {name: flat[name] for name in fields}
  return Cell(
    grids.label(fields), fields, made, grids.label({name: flat[name] for name in per}) or ALL
  )


def cell_run(sweep: Sweep, cell: Cell) -> Run:
  """The run by which a cell is compared; it does not look at test images."""
  overrides = (*sweep.overrides, *grids.overrides(cell.fields), "--config.eval.test=False")
  return _train(sweep, cell.label, sweep.workdir / "cells" / cell.label, overrides)


def _train(sweep: Sweep, name: str, workdir: Path, overrides: Sequence[str]) -> Run:
  if sweep.base.compile.cache == schema.fields()["compile.cache"].default:
    # One folder for all: a cell's programs are those of its tests with other seeds.
    shared = os.path.relpath(sweep.workdir / "compiled", workdir)
    overrides = (*overrides, f"--config.compile.cache={shared}")
  words = ("train", f"--config={sweep.config}", *overrides, f"--workdir={workdir}")
  return Run(name, workdir, words, load(sweep.config, overrides))


def choose(sweep: Sweep) -> dict[str, Choice]:
  """For each group the cell with the best validation value; of equal ones the first of the grid."""
  choices = {}
  for group, cells in sweep.groups.items():
    records = [validation(sweep, cell.label) for cell in cells]
    values = [record["value"] for record in records]
    index = selection.best(values, sweep.by)
    edges = selection.edges(cells[index].fields, [cell.fields for cell in cells], sweep.per)
    labels = [cell.label for cell in cells]
    choices[group] = Choice(
      cells[index], records[index], dict(zip(labels, values, strict=True)), edges
    )
  return choices


def validation(sweep: Sweep, label: str) -> results.Record:
  """The record by which a cell that is finished is compared."""
  workdir = sweep.workdir / "cells" / label
  return selection.record(results.read(workdir), sweep.by, str(workdir))


def final_runs(sweep: Sweep, choices: dict[str, Choice]) -> dict[str, list[Run]]:
  """For each group the runs that are tested, one for each seed."""
  return {
    group: [_final(sweep, group, choice, seed) for seed in sweep.seeds]
    for group, choice in choices.items()
  }


def _final(sweep: Sweep, group: str, choice: Choice, seed: int) -> Run:
  name, cell = f"{group}, seed {seed}", choice.cell
  if seed == cell.config.seed and not sweep.retrain:  # it is trained already
    workdir = sweep.workdir / "cells" / cell.label
    words = ("eval", f"--from={workdir}", "--test", f"--tasks={sweep.config.partition(':')[0]}")
    return Run(name, workdir, words, cell.config, tests=True)
  overrides = [*sweep.overrides, *grids.overrides(cell.fields)]
  overrides += [f"--config.seed={seed}", "--config.eval.test=True"]
  if sweep.retrain:
    overrides.append("--config.data.validation=none")
    # Without validation images a run cannot choose from its rates: it is given the one it chose.
    if len(flatten(cell.config).get("optim.rates", ())) > 1:
      overrides.append(f"--config.optim.rates=({choice.record['rate']},)")
  folder = sweep.workdir / "final" / group
  made = _train(sweep, name, folder / f"seed_{seed}", overrides)
  if (made.workdir / "config.json").exists() and not made.matches():
    # Another cell was the best before the grid got more cells: what it reached stays.
    made = _train(sweep, name, folder / cell.label / f"seed_{seed}", overrides)
  return made


def tested(r: Run) -> list[results.Record]:
  """The test records of a run that is finished, of several rates those of the chosen one."""
  found = [
    record
    for record in results.read(r.workdir)
    if record["split"] == "test" and record.get("chosen", True)
  ]
  if not found:
    raise ConfigError(f"{r.workdir}: results.json has no records of test images; expected some")
  return found
