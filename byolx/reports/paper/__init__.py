"""The paper's tables of results (appendices D to J), and which measured run is which number.

Numbers are those of the appendices, in the units that they are printed in. Tables 6 and 10 hold
settings, no results; the tables before 6 are not in the appendices.
"""

from collections.abc import Mapping

from byolx.reports.paper import ablations, evaluation, objective, transfer
from byolx.reports.paper.settings import LEFT_OPEN
from byolx.reports.paper.table import (
  MEASURABLE,
  NOT_MEASURABLE,
  OTHER_WORK,
  Cell,
  Column,
  Condition,
  OneOf,
  Row,
  Table,
)

_ALL = (
  evaluation.TABLE_7,
  evaluation.TABLE_8,
  evaluation.TABLE_9,
  transfer.TABLE_11,
  transfer.TABLE_12,
  transfer.TABLE_13,
  ablations.TABLE_14A,
  ablations.TABLE_14B,
  ablations.TABLE_15A,
  ablations.TABLE_15B,
  ablations.TABLE_16,
  ablations.TABLE_17,
  objective.TABLE_18,
  objective.TABLE_19,
  objective.TABLE_20,
  objective.TABLE_21,
  objective.TABLE_22,
  objective.TEXT,
)

TABLES: Mapping[str, Table] = {table.number: table for table in _ALL}
"""Every table, by its number."""

__all__ = [
  "LEFT_OPEN",
  "MEASURABLE",
  "NOT_MEASURABLE",
  "OTHER_WORK",
  "TABLES",
  "Cell",
  "Column",
  "Condition",
  "OneOf",
  "Row",
  "Table",
]
