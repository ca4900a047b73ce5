"""Defines a sweep: its cells, their runs, the choice among them, and the final runs.

A cell is one setting of the varied config fields. The sweep chooses the cell with the best results on
validation images, which are neither training nor test images (appendix D.1). The chosen cell is
trained with several seeds and tested once per seed. If the protocol requires it (E.2, E.3), the chosen
cell is trained on training and validation images together.
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
from byolx.tasks import TASKS, is_users_own

ALL = "all"
"""Name of the only group of cells in a sweep that has no grouping fields."""

LONGEST_LABEL = 200


@dataclasses.dataclass(frozen=True)
class Cell:
  """One candidate of a sweep: a setting of the varied config fields.

  Args:
    label: name of the cell and of its folder.
    fields: values of the varied config fields, in the fields' types.
    config: complete config of the cell's run.
    group: name of the cell's group. Only cells of the same group are compared.
  """

  label: str
  fields: dict[str, Any]
  config: ConfigDict
  group: str


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep: runs that compare settings of config fields, and then test the best of them.

  A cell is one setting of the varied fields. Each cell is trained once and measured on validation
  images. The best cells are chosen by that. Final runs, one per seed, then test the chosen cells.
  `build` makes and checks a sweep.

  Args:
    config: config file, as FILE[:ARGS].
    overrides: command-line overrides of the config, each as `--config.FIELD=VALUE`.
    workdir: folder of the sweep, for its results and its runs.
    cells: all cells.
    per: names of grouping fields: one cell is chosen for each combination of their values.
    by: metric on validation images by which the best cell is chosen, such as top-1.
    seeds: seeds of the final runs.
    retrain: whether a chosen cell is trained again before the test, on training and validation images
      together.
    base: config with the overrides, but without the values of any cell.
  """

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
    """The cells (candidate settings) of each group, by the name of the group.

    Cells are in the order of the grid.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in self.cells:
      groups.setdefault(cell.group, []).append(cell)
    return groups


@dataclasses.dataclass(frozen=True)
class Choice:
  """The cell (candidate setting) that is the best of its group on validation images.

  Args:
    cell: the chosen cell.
    record: validation result of the chosen cell, as in its results.json.
    validation: value of each cell of the group on validation images, by the cell's label.
    edges: descriptions of the numeric fields in which the chosen cell has the smallest or the largest
      value of the grid.
  """

  cell: Cell
  record: results.Record
  validation: dict[str, float]
  edges: list[str]


def build(
  path: str,
  overrides: Sequence[str],
  specs: Sequence[str],
  workdir: Path,
  *,
  per: Sequence[str] = (),
  by: By = selection.TOP1,
  seeds: Sequence[int] = (),
  retrain: bool = False,
) -> Sweep:
  """Returns a sweep with the configs of all its cells, loaded and checked. No run is started.

  A cell is one setting of the varied config fields. The final runs test the chosen cells.

  Args:
    path: config file, as FILE[:ARGS].
    overrides: command-line overrides of the config, each as `--config.FIELD=VALUE`.
    specs: grids. Each is the name of a grid or has the form FIELD=VALUE,... The sweep runs the
      Cartesian product of the grids.
    workdir: folder of the sweep, for its results and its runs.
    per: names of grouping fields. Those of named grids are added. One cell is chosen for each
      combination of the values of all grouping fields.
    by: criterion of the choice: a metric on validation images, such as top-1.
    seeds: seeds of the final runs; if empty, the seed of the config.
    retrain: whether a chosen cell is trained again before the test, on training and validation images
      together.

  Raises:
    ConfigError: a grid, field or value is invalid, or two cells have the same label.
  """
  base = load(path, overrides)  # first, as the file may register a task whose fields the grid has
  grid = grids.read(specs)
  per = tuple(dict.fromkeys([*grid.per, *per]))
  varied = list(dict.fromkeys(name for cell in grid.cells for name in cell))
  overridden = [override.removeprefix("--config.").partition("=")[0] for override in overrides]
  if "seed" in varied:
    raise ConfigError(
      "--grid: seed cannot be compared; expected --seeds, the seeds of the final runs"
    )
  if "eval.test" in [*varied, *overridden]:
    raise ConfigError("eval.test is set by the sweep, which tests only the chosen cells")
  if unknown := [name for name in per if name not in varied]:
    raise ConfigError(f"--per={unknown[0]}: expected a field of the grid: {', '.join(varied)}")
  cells = tuple(_cell(path, overrides, fields, per) for fields in grid.cells)
  for cell in cells:
    _check_cell(cell.config, varied, by, retrain)
  _check_labels(cells, per)
  return Sweep(
    path, tuple(overrides), workdir, cells, per, by, tuple(seeds) or (base.seed,), retrain, base
  )


def _check_cell(cell: ConfigDict, varied: Sequence[str], by: By, retrain: bool) -> None:
  """Checks the config of a cell (one candidate of the sweep) before any run starts.

  Without this check, the errors would appear only after all cells have run.

  Args:
    cell: config of the cell's run.
    varied: names of the config fields that the grid varies.
    by: criterion by which the cells are compared: a metric on validation images.
    retrain: whether the chosen cell is trained again on training and validation images together.

  Raises:
    ConfigError: the config does not fit the criterion, the grid or --retrain.
  """
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
      f"--retrain with data.labels={cell.data.labels}, data.label_list={cell.data.label_list!r}: with "
      "a share of the labels, --retrain adds no labels; expected no --retrain"
    )
  if "optim.base_rate" in varied and cell.optim.rates:
    raise ConfigError(
      f"--grid: optim.base_rate has no meaning beside optim.rates={tuple(cell.optim.rates)}; expected "
      "optim.rates in the grid, or --config.optim.rates=()"
    )


def _check_labels(cells: Sequence[Cell], per: Sequence[str]) -> None:
  """Checks the labels of cells (candidate settings), which are used as names of folders.

  Labels must be distinct and at most LONGEST_LABEL characters long. Groups of cells with different
  values of the grouping fields `per` must have different names.

  Raises:
    ConfigError: a label is repeated or too long, or two groups have the same name.
  """
  labels = [cell.label for cell in cells]
  if repeated := [label for label in labels if labels.count(label) > 1]:
    raise ConfigError(f"--grid: two cells are called {repeated[0]}; expected different cells")
  groups: dict[str, tuple] = {}
  for cell in cells:
    values = tuple(flatten(cell.config)[name] for name in per)
    if groups.setdefault(cell.group, values) != values:
      raise ConfigError(f"--per: two groups are called {cell.group}; expected different names")
  longest = max(labels, key=len)
  if len(longest) > LONGEST_LABEL:
    raise ConfigError(f"--grid: {longest}: expected a name of at most {LONGEST_LABEL} letters")


def _cell(path: str, overrides: Sequence[str], fields: grids.Cell, per: Sequence[str]) -> Cell:
  cell_config = load(path, [*overrides, *grids.overrides(fields), "--config.eval.test=False"])
  if cell_config.data.validation == "none":
    raise ConfigError(
      "data.validation='none': expected validation images, on which the sweep compares cells"
    )
  flat = flatten(cell_config)
  fields = {name: flat[name] for name in fields}
  return Cell(
    grids.label(fields), fields, cell_config, grids.label({name: flat[name] for name in per}) or ALL
  )


def cell_run(sweep: Sweep, cell: Cell) -> Run:
  """Returns the run that trains a cell (one candidate of the sweep) and evaluates it.

  The run is evaluated on validation images. It does not use test images.
  """
  overrides = (*sweep.overrides, *grids.overrides(cell.fields), "--config.eval.test=False")
  return _train(sweep, cell.label, sweep.workdir / "cells" / cell.label, overrides)


def _train(sweep: Sweep, name: str, workdir: Path, overrides: Sequence[str]) -> Run:
  if sweep.base.compile.cache == schema.fields()["compile.cache"].default:
    # One compilation cache for the sweep: final runs compile the same programs as their cells.
    cache = os.path.relpath(sweep.workdir / "compiled", workdir)
    overrides = (*overrides, f"--config.compile.cache={cache}")
  arguments = ("train", f"--config={sweep.config}", *overrides, f"--workdir={workdir}")
  return Run(name, workdir, arguments, load(sweep.config, overrides))


def choose(sweep: Sweep) -> dict[str, Choice]:
  """Chooses the cell (candidate setting) with the best validation value in each group.

  If several cells have the same value, the first one is chosen.

  Args:
    sweep: sweep whose cells are all finished.

  Returns:
    Chosen cell of each group, by the name of the group.

  Raises:
    ConfigError: a cell has no validation record for the sweep's criterion.
  """
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
  """Returns the validation record (one result) of a finished cell (candidate setting).

  The sweep compares cells by these records.

  Args:
    sweep: the sweep.
    label: label of the cell.

  Raises:
    ConfigError: the cell has no validation record for the sweep's criterion.
  """
  workdir = sweep.workdir / "cells" / label
  return selection.record(results.read(workdir), sweep.by, str(workdir))


def final_runs(sweep: Sweep, choices: dict[str, Choice]) -> dict[str, list[Run]]:
  """Returns the final runs of each group, by the name of the group.

  The final runs test the cell (candidate setting) that was chosen in the group. There is one run per
  seed, in the order of the sweep's seeds.
  """
  return {
    group: [_final(sweep, group, choice, seed) for seed in sweep.seeds]
    for group, choice in choices.items()
  }


def _final(sweep: Sweep, group: str, choice: Choice, seed: int) -> Run:
  name, cell = f"{group}, seed {seed}", choice.cell
  if seed == cell.config.seed and not sweep.retrain:  # the cell's run is already trained
    workdir = sweep.workdir / "cells" / cell.label
    arguments = ("eval", f"--from={workdir}", "--test", *_own_task(sweep, cell))
    return Run(name, workdir, arguments, cell.config, tests=True)
  overrides = [*sweep.overrides, *grids.overrides(cell.fields)]
  overrides += [f"--config.seed={seed}", "--config.eval.test=True"]
  if sweep.retrain:
    overrides.append("--config.data.validation=none")
    # A run without validation images cannot choose a rate, so it gets the one chosen before.
    if len(flatten(cell.config).get("optim.rates", ())) > 1:
      overrides.append(f"--config.optim.rates=({choice.record['rate']},)")
  folder = sweep.workdir / "final" / group
  run = _train(sweep, name, folder / f"seed_{seed}", overrides)
  if (run.workdir / "config.json").exists() and not run.matches():
    # This folder has the run of an earlier choice, made before the grid was extended: keep its results.
    run = _train(sweep, name, folder / cell.label / f"seed_{seed}", overrides)
  return run


def _own_task(sweep: Sweep, cell: Cell) -> list[str]:
  """Returns the argument of `byolx eval` that loads the user's own task from the config file.

  The result is a list. It is empty if the task is one of this package.
  """
  if not is_users_own(cell.config.task):
    return []
  return [f"--tasks={sweep.config.partition(':')[0]}"]


def tested(run: Run) -> list[results.Record]:
  """Returns the test records of a finished run. A record is a dictionary of one result.

  If the run has several learning rates, only records of the chosen rate are returned.

  Raises:
    ConfigError: the run has no test records.
  """
  records = [
    record
    for record in results.read(run.workdir)
    if record["split"] == "test" and record.get("chosen", True)
  ]
  if not records:
    raise ConfigError(f"{run.workdir}: results.json has no records of test images; expected some")
  return records
