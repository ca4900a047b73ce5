"""What `byolx report` prints: results, or a table of the paper, as text, Markdown, CSV or JSON."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from byolx.reports import compare
from byolx.reports.compare import Departure, Result, cost, encoder, metric, network, protocol, share
from byolx.reports.paper import MEASURABLE, NOT_MEASURABLE, TABLES, Cell, Column, Row, Table

FORMATS = ("text", "markdown", "csv", "json")
NOT_RUN = "not run"
SMALLEST_INTERVAL = 0.25
"""Points: the paper leaves out smaller intervals (appendix G), and so do text and Markdown."""

OFF_PROTOCOL = "off protocol"
LISTED_DEPARTURES = 8
"""Fields of a run off protocol that text and Markdown list; CSV and JSON have all."""

Grid = list[list[str]]
"""Rows of cells; the first row is the heading."""


def results_page(found: Sequence[Result], style: str) -> str:
  """Every result: protocol, data, encoder, labels, the paper's number, ours, config, commit, cost.

  Args:
    found: results.
    style: one of `FORMATS`. CSV and JSON have values and the paper's numbers in 0..1, other units as
      they are.
  """
  if style in ("csv", "json"):
    rows = [_result_facts(one) for one in found]
    return _csv(rows) if style == "csv" else _json(rows)
  heading = ["protocol", "data", "encoder", "labels", "metric", "paper", "measured", "n"]
  grid: Grid = [[*heading, "config", "commit", "cost"]]
  strays: dict[str, int] = {}
  for one in found:
    grid.append(
      [
        protocol(one),
        one.data or "",
        encoder(one),
        share(one),
        metric(one),
        _paper_text(one) or _stray_text(one, strays),
        _percent(one.value, one.interval),
        str(one.n),
        ", ".join(one.configs),
        ", ".join(commit[:12] for commit in one.commits),
        cost(one),
      ]
    )
  notes = [
    "paper, measured: in %; ± half the range over repeats, from "
    f"{SMALLEST_INTERVAL:g} points on; n: repeats; the paper's table in brackets",
    "cost: training alone, of each run",
    *(f"[{number}] {text}" for text, number in strays.items()),
  ]
  return _grid_text(grid, notes, style, numbers={"labels", "n"})


def table_page(table: Table, found: Sequence[Result], style: str) -> str:
  """A table of the paper, what was measured beside each of its columns.

  A column of which no row can be measured has none beside it in text and Markdown, and is named below.
  Results that differ from a number of the table in its protocol alone are listed below as off protocol.

  Args:
    table: of `byolx.reports.paper`.
    found: results; those of other tables are left out.
    style: one of `FORMATS`. In CSV and JSON every number of the table is a row, in its own unit.
  """
  strays = [one for one in found if not compare.in_paper(one)]
  if style in ("csv", "json"):
    facts = [
      _cell_facts(table, row, column, cell, found, strays)
      for row in table.rows
      for column, cell in zip(table.columns, row.cells, strict=True)
    ]
    about = {"table": table.number, "caption": table.caption, "note": table.note}
    return _csv(facts) if style == "csv" else _json({**about, "cells": facts})
  sources: dict[str, int] = {}
  heading = list(table.headings)
  for column in table.columns:
    heading += [column.title, "measured"] if _measured_in(table, column) else [column.title]
  grid: Grid = [heading]
  for row in table.rows:
    cells = list(row.labels)
    for column, cell in zip(table.columns, row.cells, strict=True):
      text = _number(cell.value, cell.interval, column)
      cells.append(_Bold(text) if cell.best and style == "markdown" else text)
      if _measured_in(table, column):
        cells.append(_measured(table, row, column, found, sources))
    grid.append(cells)
  notes = [*_table_notes(table, grid), *_off_protocol_notes(table, strays, sources)]
  notes += [f"[{n}] {text}" for text, n in sources.items()]
  title = f"Table {table.number}" if table.number != "text" else "Stated in the text"
  units = {column.unit for column in table.columns}
  caption = f"{title}. {table.caption}" + ("; in %" if units == {"%"} else "")
  numbers = set(heading) - set(table.headings)
  return _grid_text(grid, notes, style, numbers, caption)


def tables_page() -> str:
  """All tables of the paper: number, rows, how many numbers could be measured, caption."""
  grid: Grid = [["table", "numbers", "measurable", ""]]
  for table in TABLES.values():
    cells = [
      table.status(row, column)
      for row in table.rows
      for column, cell in zip(table.columns, row.cells, strict=True)
      if cell.value is not None
    ]
    counts = [str(len(cells)), str(cells.count(MEASURABLE))]
    grid.append([table.number, *counts, table.caption])
  return _aligned(grid, {"numbers", "measurable"}) + "\n"


class _Bold(str):
  """A cell that Markdown shows bold."""


def _measured_in(table: Table, column: Column) -> bool:
  return any(table.status(row, column) == MEASURABLE for row in table.rows)


def _measured(
  table: Table, row: Row, column: Column, found: Sequence[Result], sources: dict[str, int]
) -> str:
  """A measured cell; every result behind it gets its number among the sources."""
  status = table.status(row, column)
  if status != MEASURABLE:
    return NOT_MEASURABLE if status == NOT_MEASURABLE else ""
  texts = []
  for one in compare.of_cell(table, row, column, found):
    number = sources.setdefault(_source(one), len(sources) + 1)
    texts.append(
      f"{_number(_in_unit(one.value, column), _interval(one, column), column)} [{number}]"
    )
  return ", ".join(texts) or NOT_RUN


def _off_protocol_notes(
  table: Table, strays: Sequence[Result], sources: dict[str, int]
) -> list[str]:
  """Below a table: results off its protocol, each with its row and column, and what differs."""
  notes = []
  for row in table.rows:
    for column in table.columns:
      for one, fields in compare.off_protocol(table, row, column, strays):
        number = sources.setdefault(_source(one), len(sources) + 1)
        place = ", ".join(filter(None, [*row.labels, column.title]))
        value = _number(_in_unit(one.value, column), _interval(one, column), column)
        notes.append(f"{OFF_PROTOCOL}: {place}: {value} [{number}]; {_departures_text(fields)}")
  return notes


def _stray_text(one: Result, notes: dict[str, int]) -> str:
  """`off protocol [1]`, with a note of what differs; empty if the paper has nothing like it."""
  places, fields = compare.nearest(one)
  if not places:
    return ""
  cells: dict[str, list[str]] = {}
  for table, column, cell in places:
    cells.setdefault(_number(cell.value, cell.interval, column), []).append(table.number)
  paper = "; ".join(f"{text} ({', '.join(dict.fromkeys(n))})" for text, n in cells.items())
  note = f"{OFF_PROTOCOL}, so not the paper's {paper}: {_departures_text(fields)}"
  return f"{OFF_PROTOCOL} [{notes.setdefault(note, len(notes) + 1)}]"


def _departures_text(fields: Sequence[Departure]) -> str:
  listed = [str(each) for each in fields[:LISTED_DEPARTURES]]
  more = len(fields) - len(listed)
  return ", ".join(listed) + (f", and {more} more" if more else "")


def _source(one: Result) -> str:
  """Where a number comes from; the same for all metrics of a run."""
  seeds = ", ".join(map(str, one.seeds)) or "unknown"
  facts = [
    f"seed{'s' if len(one.seeds) > 1 else ''} {seeds}",
    f"config {', '.join(one.configs) or 'unknown'}",
    f"commit {', '.join(commit[:12] for commit in one.commits) or 'unknown'}",
    cost(one) if one.seconds is not None else "cost unknown",
  ]
  if one.record["task"] != "supervised" and one.record.get("pretrain") is None:
    facts.append("how its encoder was pretrained is unknown")
  if choices := compare.open_choices(one):
    facts.append(f"left open by the paper: {', '.join(choices)}")
  places = ", ".join(map(str, one.workdirs))
  return "; ".join(facts) + (f"; {places}" if places else "")


def _table_notes(table: Table, grid: Grid) -> list[str]:
  notes = [table.note] if table.note else []
  left_out = [
    column.title
    for column in table.columns
    if not column.theirs and not _measured_in(table, column)
  ]
  if len(left_out) == len(table.columns):
    notes.append(f"{NOT_MEASURABLE}: the whole table; this library has no fields for it")
  elif left_out:
    notes.append(f"{NOT_MEASURABLE}, in any row: {', '.join(left_out)}")
  if any(NOT_MEASURABLE in cells for cells in grid):
    notes.append(f"{NOT_MEASURABLE}: this library has no fields for it")
  if any("[" in cell for row in table.rows if row.theirs for cell in row.labels):
    notes.append("rows with [n] are other publications")
  return notes


def _in_unit(value: float, column: Column) -> float:
  return 100 * value if column.unit == "%" else value


def _interval(one: Result, column: Column) -> float | None:
  return None if one.interval is None else _in_unit(one.interval, column)


def _number(value: float | None, interval: float | None, column: Column) -> str:
  """As the paper prints it; more decimals where it has them."""
  if value is None:
    return "-"
  text = f"{value:.{column.decimals}f}"
  if 0 < value < 0.5 * 10**-column.decimals:
    text = f"{value:g}" if value >= 0.01 else "0"
  shown = interval is not None and (column.unit != "%" or interval >= SMALLEST_INTERVAL)
  return f"{text} ± {interval:.{column.decimals}f}" if shown else text


def _percent(value: float, interval: float | None) -> str:
  return _number(100 * value, None if interval is None else 100 * interval, Column(""))


def _paper_text(one: Result) -> str:
  """`74.3 (7, 9, 13)`; empty if the paper has no such number."""
  places: dict[str, list[str]] = {}
  for table, column, cell in compare.in_paper(one):
    places.setdefault(_number(cell.value, cell.interval, column), []).append(table.number)
  return "; ".join(f"{text} ({', '.join(tables)})" for text, tables in places.items())


def _result_facts(one: Result) -> dict[str, Any]:
  """A result for programs."""
  paper = compare.in_paper(one)
  _, departures = compare.nearest(one)
  record = one.record
  return {
    "task": record["task"],
    "protocol": record["protocol"],
    "variation": protocol(one),
    "data": one.data,
    "encoder": record.get("encoder"),
    "network": network(one.config),
    "pretrained_on": record.get("pretrained_on"),
    "labels": record.get("labels"),
    "split": record["split"],
    "metric": record["metric"],
    "paper": next((_fraction(cell.value, column) for _, column, cell in paper), None),
    "paper_tables": [table.number for table, _, _ in paper],
    "off_protocol": [str(each) for each in departures],
    "value": one.value,
    "interval": one.interval,
    "n": one.n,
    "seeds": list(one.seeds),
    "step": record.get("step"),
    "rate": record.get("rate"),
    "chosen": record.get("chosen"),
    "configs": list(one.configs),
    "commits": list(one.commits),
    "seconds": one.seconds,
    "devices": record.get("devices"),
    "workdirs": [str(workdir) for workdir in one.workdirs],
  }


def _fraction(value: float | None, column: Column) -> float | None:
  return round(value / 100, 6) if value is not None and column.unit == "%" else value


def _cell_facts(
  table: Table,
  row: Row,
  column: Column,
  cell: Cell,
  found: Sequence[Result],
  strays: Sequence[Result],
) -> dict[str, Any]:
  """One number of a table for programs; `measured` has every result that is this number.

  `off_protocol` has those that differ in the protocol, `off_protocol_fields` their fields.
  """
  off = compare.off_protocol(table, row, column, strays)
  here = compare.of_cell(table, row, column, found)
  status = table.status(row, column)
  return {
    **dict(zip(table.headings, row.labels, strict=True)),
    "column": column.title,
    "unit": column.unit,
    "better": "higher" if column.higher_is_better else "lower",
    "paper": cell.value,
    "paper_interval": cell.interval,
    "status": ("measured" if here else NOT_RUN) if status == MEASURABLE else status,
    "measured": [round(_in_unit(one.value, column), 6) for one in here],
    "interval": [_interval(one, column) for one in here],
    "n": [one.n for one in here],
    "configs": [", ".join(one.configs) for one in here],
    "commits": [", ".join(one.commits) for one in here],
    "seconds": [one.seconds for one in here],
    "devices": [one.record.get("devices") for one in here],
    "workdirs": [", ".join(map(str, one.workdirs)) for one in here],
    "off_protocol": [round(_in_unit(one.value, column), 6) for one, _ in off],
    "off_protocol_fields": [", ".join(map(str, fields)) for _, fields in off],
  }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a row; lists are joined by semicolons, None is empty."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {
        key: ";".join("" if x is None else str(x) for x in value)
        if isinstance(value, list)
        else value
        for key, value in row.items()
      }
    )
  return text.getvalue()


def _json(content: Any) -> str:
  return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _grid_text(
  grid: Grid, notes: Iterable[str], style: str, numbers: set[str], caption: str = ""
) -> str:
  """A grid as text or Markdown, with a caption above and notes below."""
  if style == "markdown":
    sections = [f"**{_escape(caption)}**" if caption else "", _markdown(grid, numbers)]
    sections += [_escape(note) for note in notes]
  else:
    sections = [caption, _aligned(grid, numbers), "\n".join(notes)]
  return "\n\n".join(filter(None, sections)) + "\n"


def _aligned(grid: Grid, numbers: set[str]) -> str:
  """Columns of equal width; those whose heading is among `numbers` to the right."""
  widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
  lines = []
  for row in grid:
    cells = zip(grid[0], row, widths, strict=True)
    lines.append(
      "  ".join(c.rjust(width) if head in numbers else c.ljust(width) for head, c, width in cells)
    )
  rule = "-" * max(len(line.rstrip()) for line in lines)
  return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


def _markdown(grid: Grid, numbers: set[str]) -> str:
  rule = ["--:" if head in numbers else "---" for head in grid[0]]
  rows = [
    [f"**{_escape(cell)}**" if isinstance(cell, _Bold) else _escape(cell) for cell in row]
    for row in grid
  ]
  rows.insert(1, rule)
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escape(text: str) -> str:
  """Text that Markdown shows as it is, in a cell or below a table."""
  return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(text.split()))
