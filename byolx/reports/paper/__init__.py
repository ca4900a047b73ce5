"""The paper's tables of results (appendices D to J), with the settings that each number requires.

A run can be compared with a number of the paper only if it has these settings. Numbers and units are
those printed in the appendices. Tables 6 and 10 are missing since they hold settings, not results.
Tables 1 to 5 are missing since they are not in the appendices.
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
"""All tables of results, by their number in the paper, such as "9" or "14a"."""

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
