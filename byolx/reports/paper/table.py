"""Classes for the paper's tables, and for the settings that a run must have to match a cell."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

OTHER_WORK = "other work"
NOT_MEASURABLE = "not measurable yet"
MEASURABLE = "measurable"

NETWORK = ("model.arch", "model.width")
"""Config fields that define the network of a table's row: its architecture and width."""


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Allowed values of a config field. The paper chooses one of them on validation images."""

  values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Condition:
  """Required settings: a run can be compared with a table cell only if it has these values.

  Args:
    record: required values in the run's record, an entry of results.json.
    config: required values of config fields of the run. A value may be a `OneOf`, which has several
      allowed values.
    pretrain: required values of config fields of the run that pretrained the encoder. A value may be a
      `OneOf`.
    origin_known: whether to reject a record that does not say how its encoder was pretrained, such as
      one of converted weights. If False, the record's `pretrained_on` and `pretrain` are compared only
      if the record has them.
  """

  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pretrain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  origin_known: bool = False

  def but(self, other: "Condition") -> "Condition":
    """Returns a condition with the required values of both conditions.

    If both have a value for a key, that of `other` is used.
    """
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
    value: number in the unit of its column; None if the paper has no number here.
    interval: half the range over seeds, in the unit of the column; None if the paper does not print it.
      The paper omits intervals below 0.25 points (appendix G).
    best: whether the paper prints the number in bold.
  """

  value: float | None
  interval: float | None = None
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of numbers in a table.

  Args:
    name: heading of the column in the paper.
    group: heading that the column shares with its neighbours; "" if it shares none.
    condition: settings that all cells of the column require of a run; None if this library cannot yet
      measure any of them.
    unit: unit of the numbers: "%", "m" (metres), or "" for a ratio.
    higher_is_better: whether the largest value is the best.
    decimals: number of printed decimals.
    theirs: whether the numbers come from other publications.
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
    """The column's group and name on one line."""
    return f"{self.group} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Args:
    labels: texts before the numbers, one per label heading of the table.
    cells: cells with the numbers, one per column.
    condition: settings that the row's cells require of a run, in addition to those of the column; None
      if this library cannot yet measure any of them.
    theirs: whether the numbers come from other publications.
  """

  labels: tuple[str, ...]
  cells: tuple[Cell, ...]
  condition: Condition | None = None
  theirs: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """One table of results.

  Args:
    number: number of the table in the paper, such as "9" or "14a". The number "text" is for results that
      the appendices state in their text.
    caption: shortened caption.
    headings: headings of the row labels.
    columns: columns of numbers.
    rows: rows, with one label per heading and one cell per column.
    note: remark below the table; "" if there is none.

  Raises:
    ValueError: a row does not have one label per heading and one cell per column.
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
    """Names of the fields that distinguish the rows, in the config and in the config of the pretraining.

    A field distinguishes the rows if a row requires another value than its column. The fields of the
    network are also included. All other fields belong to the protocol of the table.
    """
    config, pretrain = set(NETWORK), set[str]()
    for row, column in itertools.product(self.rows, self.columns):
      if row.condition is not None and column.condition is not None:
        config |= _changed(column.condition.config, row.condition.config)
        pretrain |= _changed(column.condition.pretrain, row.condition.pretrain)
    return frozenset(config), frozenset(pretrain)

  def condition(self, row: Row, column: Column) -> Condition | None:
    """Returns the settings that a run must have to be compared with a cell.

    Returns None if this library cannot measure the cell. `status` then returns the reason.
    """
    if row.theirs or column.theirs or row.condition is None or column.condition is None:
      return None
    return column.condition.but(row.condition)

  def status(self, row: Row, column: Column) -> str:
    """Returns the status of a cell.

    Returns:
      `MEASURABLE` if this library can measure the cell, `NOT_MEASURABLE` if it cannot yet, or
      `OTHER_WORK` if the number comes from another publication.
    """
    if row.theirs or column.theirs:
      return OTHER_WORK
    return MEASURABLE if self.condition(row, column) else NOT_MEASURABLE


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
  """Returns the names that are in both mappings with different values."""
  return {name for name, value in after.items() if name in before and before[name] != value}


def row(
  *labels: str,
  cells: tuple[Cell | float | None, ...],
  condition: Condition | None = None,
  theirs: bool = False,
) -> Row:
  """Returns a row of a table, whose cells may be given as plain numbers.

  Args:
    *labels: texts before the numbers.
    cells: cells or numbers, one per column; None where the paper has no number.
    condition: settings that the row requires of a run, in addition to those of the columns; None if this
      library cannot measure the row yet.
    theirs: whether the numbers come from other publications.
  """
  row_cells = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
  return Row(labels, row_cells, condition, theirs)


def best(value: float) -> Cell:
  """Returns a cell with a number that the paper prints in bold."""
  return Cell(value, best=True)


def spread(value: float, interval: float) -> Cell:
  """Returns a cell with a number and its interval, printed as value ± interval."""
  return Cell(value, interval)
