"""What a table of the paper is: columns, rows, numbers, and which measured run is which of them."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

OTHER_WORK = "other work"
NOT_MEASURABLE = "not measurable yet"
MEASURABLE = "measurable"

NETWORK = ("model.arch", "model.width")
"""Fields that name the network of a row."""


@dataclasses.dataclass(frozen=True)
class OneOf:
  """The values of a field that the paper chooses between on validation images."""

  values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Condition:
  """When a measured run is a row of a table: every key named here has the value given here.

  A value of `config` or `pretrain` may be a `OneOf`.

  Args:
    record: keys of a record of results.json.
    config: fields of the run that was measured.
    pretrain: fields of the run that its encoder comes from.
    origin_known: whether a record that does not say where its encoder comes from, such as one of
      converted weights, is refused. Otherwise `pretrained_on` and `pretrain` are compared only where
      the record has them.
  """

  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  pretrain: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  origin_known: bool = False

  def but(self, other: "Condition") -> "Condition":
    """Both together; where they disagree, the other."""
    return Condition(
      {**self.record, **other.record},
      {**self.config, **other.config},
      {**self.pretrain, **other.pretrain},
      self.origin_known or other.origin_known,
    )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number, in the unit of its column; None where the paper has none.

  Args:
    value: the number.
    interval: half the range over seeds, where the paper gives one (it leaves out those below 0.25).
    best: the paper prints it bold.
  """

  value: float | None
  interval: float | None = None
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of numbers.

  Args:
    name: as the paper calls it.
    group: the heading over several columns.
    condition: None: not measurable with this library's fields yet, in any row.
    unit: "%", "m" (metres), or "" for a ratio.
    higher_is_better: the better direction.
    decimals: as printed.
    theirs: numbers of other publications.
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
    """Group and name."""
    return f"{self.group} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class Row:
  """A row: what stands before the numbers, and the numbers; `theirs` and `condition` as in Column."""

  labels: tuple[str, ...]
  cells: tuple[Cell, ...]
  condition: Condition | None = None
  theirs: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """One table of results.

  Args:
    number: as the paper counts them, such as "9" or "14a".
    caption: in short.
    headings: of the labels of a row.
    columns: of numbers.
    rows: each with as many labels as headings, and as many cells as columns.
    note: what the paper says elsewhere about these numbers, or how a row is to be read.

  Raises:
    ValueError: a row of another length.
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
    """Fields that tell the rows apart: those of the measured run, and those of its pretraining.

    They are the network and what a row changes of its column. The others are the table's protocol.
    """
    config, pretrain = set(NETWORK), set[str]()
    for row, column in itertools.product(self.rows, self.columns):
      if row.condition is not None and column.condition is not None:
        config |= _changed(column.condition.config, row.condition.config)
        pretrain |= _changed(column.condition.pretrain, row.condition.pretrain)
    return frozenset(config), frozenset(pretrain)

  def condition(self, row: Row, column: Column) -> Condition | None:
    """Which measured run is this cell; None: none, see `status`."""
    if row.theirs or column.theirs or row.condition is None or column.condition is None:
      return None
    return column.condition.but(row.condition)

  def status(self, row: Row, column: Column) -> str:
    """`MEASURABLE`, `NOT_MEASURABLE` with this library's fields yet, or `OTHER_WORK`."""
    if row.theirs or column.theirs:
      return OTHER_WORK
    return MEASURABLE if self.condition(row, column) else NOT_MEASURABLE


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
  """Names that both have with different values."""
  return {name for name, value in after.items() if name in before and before[name] != value}


def row(
  *labels: str,
  cells: tuple[Cell | float | None, ...],
  condition: Condition | None = None,
  theirs: bool = False,
) -> Row:
  """A row whose cells may be written as plain numbers."""
  made = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
  return Row(labels, made, condition, theirs)


def best(value: float) -> Cell:
  """A number that the paper prints bold."""
  return Cell(value, best=True)


def spread(value: float, interval: float) -> Cell:
  """A number with its interval: value ± interval."""
  return Cell(value, interval)
