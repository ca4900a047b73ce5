"""Tables of the paper: columns, rows, cells, and the conditions for runs that measure them."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

OTHER_WORK = "other work"
NOT_MEASURABLE = "not measurable yet"
MEASURABLE = "measurable"

NETWORK = ("model.arch", "model.width")
"""Config fields that define the network of a row."""


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Values of a field among which the paper chooses on validation images."""

  values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Condition:
  """Condition for a measured run to be a cell of a table: required values of keys and fields.

  Args:
    record: required values of keys of the run's record in results.json.
    config: required values of config fields of the run. A value may be a `OneOf`.
    pretrain: required values of config fields of the encoder's pretraining run. A value may be a
      `OneOf`.
    origin_known: True to reject records without facts on the encoder's pretraining, such as those of
      converted weights; False to compare `pretrained_on` and `pretrain` only if the record has them.
  """

  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pretrain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  origin_known: bool = False

  def but(self, other: "Condition") -> "Condition":
    """Combine two conditions. Where both have a value, that of `other` counts."""
    return Condition(
      {**self.record, **other.record},
      {**self.config, **other.config},
      {**self.pretrain, **other.pretrain},
      self.origin_known or other.origin_known,
    )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number of a table.

  Args:
    value: number in the unit of its column; None if the paper has none.
    interval: half the range over seeds, in the same unit; None if the paper omits it, as it does below
      0.25 points (appendix G).
    best: True if the paper prints the number in bold.
  """

  value: float | None
  interval: float | None = None
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of numbers.

  Args:
    name: heading of the column in the paper.
    group: heading above several columns, or "".
    condition: condition that all measured cells of the column share; None if this library cannot
      measure any of them yet.
    unit: "%", "m" (metres), or "" for a ratio.
    higher_is_better: True if the largest value is the best.
    decimals: number of printed decimals.
    theirs: True for numbers of other publications.
  """

  name: str
  group: str = ""
  condition: Condition | None = None
  unit: str = "%"
  higher_is_better: bool = True
  decimals: int = 1
  theirs: bool = False

  @property
  def title(self) -> str:
    """Group and name of the column, as one line."""
    return f"{self.group} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Args:
    labels: texts before the numbers, one per heading of the table.
    cells: numbers, one per column.
    condition: condition that the measured cells of the row add to those of the columns; None if this
      library cannot measure any of them yet.
    theirs: True for numbers of other publications.
  """

  labels: tuple[str, ...]
  cells: tuple[Cell, ...]
  condition: Condition | None = None
  theirs: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """One table of results.

  Args:
    number: number of the table in the paper, such as "9" or "14a"; "text" for results in the text.
    caption: shortened caption.
    headings: headings of the labels.
    columns: columns of numbers.
    rows: rows with one label per heading and one cell per column.
    note: remark below the table, or "".

  Raises:
    ValueError: a row has another number of labels or cells.
  """

  number: str
  caption: str
  headings: tuple[str, ...]
  columns: tuple[Column, ...]
  rows: tuple[Row, ...]
  note: str = ""

  def __post_init__(self):
    for row in self.rows:
      if (len(row.labels), len(row.cells)) != (len(self.headings), len(self.columns)):
        raise ValueError(
          f"Table {self.number}, row {row.labels}: {len(row.labels)} labels and {len(row.cells)} "
          f"cells; expected {len(self.headings)} and {len(self.columns)}"
        )

  @functools.cached_property
  def defining(self) -> tuple[frozenset[str], frozenset[str]]:
    """Fields that distinguish the rows, in the config and in the pretraining config.

    These are the network and the fields in which the condition of a row changes that of its column. All
    other fields belong to the table's protocol.
    """
    config, pretrain = set(NETWORK), set[str]()
    for row, column in itertools.product(self.rows, self.columns):
      if row.condition is not None and column.condition is not None:
        config |= _changed(column.condition.config, row.condition.config)
        pretrain |= _changed(column.condition.pretrain, row.condition.pretrain)
    return frozenset(config), frozenset(pretrain)

  def condition(self, row: Row, column: Column) -> Condition | None:
    """Condition for a run to measure a cell; None if no run can, for the reason given by `status`."""
    if row.theirs or column.theirs or row.condition is None or column.condition is None:
      return None
    return column.condition.but(row.condition)

  def status(self, row: Row, column: Column) -> str:
    """Status of a cell: `MEASURABLE` by this library, `NOT_MEASURABLE` yet, or `OTHER_WORK`."""
    if row.theirs or column.theirs:
      return OTHER_WORK
    return MEASURABLE if self.condition(row, column) else NOT_MEASURABLE


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
  """Names that are in both mappings, with different values."""
  return {name for name, value in after.items() if name in before and before[name] != value}


def row(
  *labels: str,
  cells: tuple[Cell | float | None, ...],
  condition: Condition | None = None,
  theirs: bool = False,
) -> Row:
  """Make a row from cells or plain numbers."""
  row_cells = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
  return Row(labels, row_cells, condition, theirs)


def best(value: float) -> Cell:
  """Cell with a number that the paper prints in bold."""
  return Cell(value, best=True)


def spread(value: float, interval: float) -> Cell:
  """Cell with a number and its interval: value ± interval."""
  return Cell(value, interval)
