"""Formats results or a table of the paper for `byolx report`, as text, Markdown, CSV or JSON."""

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
"""Smallest interval in % that text and Markdown show. The paper omits smaller intervals (appendix G)."""

OFF_PROTOCOL = "off protocol"
LISTED_DEPARTURES = 8
"""Largest number of fields named in text and Markdown where a run differs from the paper's protocol.

CSV and JSON name all such fields.
"""

Grid = list[list[str]]
"""Rows of text cells. The first row has the headings."""


def results_page(results: Sequence[Result], style: str) -> str:
  """Formats results beside the paper's numbers, with one row per result.

  Args:
    results: results, in the order of the rows.
    style: output format, one of `FORMATS`. Text and Markdown have accuracies in %, CSV and JSON in 0..1.
      The paper's numbers in other units are not converted.

  Returns:
    Text with the rows. In text and Markdown, a row has protocol, data set, encoder, share of labels,
    metric, the paper's number, the measured number, number of repeats, config, commit and training time.
    In CSV and JSON, a row has more facts.
  """
  if style in ("csv", "json"):
    rows = [_result_facts(result) for result in results]
    return _csv(rows) if style == "csv" else _json(rows)
  heading = ["protocol", "data", "encoder", "labels", "metric", "paper", "measured", "n"]
  grid: Grid = [[*heading, "config", "commit", "cost"]]
  footnotes: dict[str, int] = {}
  for result in results:
    grid.append(
      [
        protocol(result),
        result.data or "",
        encoder(result),
        share(result),
        metric(result),
        _paper_text(result) or _off_protocol_text(result, footnotes),
        _percent(result.value, result.interval),
        str(result.n),
        ", ".join(result.configs),
        ", ".join(commit[:12] for commit in result.commits),
        cost(result),
      ]
    )
  notes = [
    "paper, measured: in %; ± half the range over repeats, from "
    f"{SMALLEST_INTERVAL:g} points on; n: repeats; the paper's table in brackets",
    "cost: training alone, of each run",
    *(f"[{number}] {text}" for text, number in footnotes.items()),
  ]
  return _grid_text(grid, notes, style, numbers={"labels", "n"})


def table_page(table: Table, results: Sequence[Result], style: str) -> str:
  """Formats a table of the paper, with the measured numbers beside the paper's.

  In text and Markdown, a column of measured numbers follows each column that has a cell which this
  library can measure. A note names the other columns. Results marked "off protocol" are listed below the
  table. They have the settings of a cell, except for fields that do not distinguish the table's rows.

  Args:
    table: table of `byolx.reports.paper`.
    results: results; those that do not belong to this table are ignored.
    style: output format, one of `FORMATS`. CSV and JSON have one row per cell of the table, with numbers
      in the unit of the cell's column.
  """
  candidates = [result for result in results if not compare.in_paper(result)]
  if style in ("csv", "json"):
    facts = [
      _cell_facts(table, row, column, cell, results, candidates)
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
      number = _number(cell.value, cell.interval, column)
      cells.append(_Bold(number) if cell.best and style == "markdown" else number)
      if _measured_in(table, column):
        cells.append(_measured(table, row, column, results, sources))
    grid.append(cells)
  notes = [*_table_notes(table, grid), *_off_protocol_notes(table, candidates, sources)]
  notes += [f"[{number}] {source}" for source, number in sources.items()]
  title = f"Table {table.number}" if table.number != "text" else "Stated in the text"
  units = {column.unit for column in table.columns}
  caption = f"{title}. {table.caption}" + ("; in %" if units == {"%"} else "")
  numbers = set(heading) - set(table.headings)
  return _grid_text(grid, notes, style, numbers, caption)


def tables_page() -> str:
  """Returns a list of the paper's tables as text.

  Each line has the number of a table, the count of the numbers in it, how many of them this library can
  measure, and the caption.
  """
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
  """Text of a cell that is printed in bold in Markdown."""


def _measured_in(table: Table, column: Column) -> bool:
  return any(table.status(row, column) == MEASURABLE for row in table.rows)


def _measured(
  table: Table, row: Row, column: Column, results: Sequence[Result], sources: dict[str, int]
) -> str:
  """Returns the text for the column of measured results, beside one number of a paper table.

  The text holds the measured results, or the reason why there are none. Each result is followed by the
  number of its footnote in brackets. New footnotes are added to `sources`, which maps the text of a
  footnote to the footnote's number.
  """
  status = table.status(row, column)
  if status != MEASURABLE:
    return NOT_MEASURABLE if status == NOT_MEASURABLE else ""
  texts = []
  for result in compare.of_cell(table, row, column, results):
    number = sources.setdefault(_source(result), len(sources) + 1)
    texts.append(
      f"{_number(_in_unit(result.value, column), _interval(result, column), column)} [{number}]"
    )
  return ", ".join(texts) or NOT_RUN


def _off_protocol_notes(
  table: Table, candidates: Sequence[Result], sources: dict[str, int]
) -> list[str]:
  """Returns notes on the results that have the settings of a cell, except for some protocol fields.

  The protocol of a table is the fields that do not distinguish its rows. A note has the row and column
  of the cell, the measured number and the differing fields. New footnotes are added to `sources`, which
  maps their texts to their numbers.
  """
  notes = []
  for row in table.rows:
    for column in table.columns:
      for result, fields in compare.off_protocol(table, row, column, candidates):
        number = sources.setdefault(_source(result), len(sources) + 1)
        place = ", ".join(filter(None, [*row.labels, column.title]))
        value = _number(_in_unit(result.value, column), _interval(result, column), column)
        notes.append(f"{OFF_PROTOCOL}: {place}: {value} [{number}]; {_departures_text(fields)}")
  return notes


def _off_protocol_text(result: Result, footnotes: dict[str, int]) -> str:
  """Returns `off protocol [1]` for a result that differs from a cell of the paper only in the protocol.

  The number in brackets is that of a footnote. The footnote has the paper's number and the differing
  fields. It is added to `footnotes`, which maps texts to numbers. The returned text is empty if there is
  no such cell.
  """
  places, fields = compare.nearest(result)
  if not places:
    return ""
  cells: dict[str, list[str]] = {}
  for table, column, cell in places:
    cells.setdefault(_number(cell.value, cell.interval, column), []).append(table.number)
  paper = "; ".join(f"{text} ({', '.join(dict.fromkeys(n))})" for text, n in cells.items())
  note = f"{OFF_PROTOCOL}, so not the paper's {paper}: {_departures_text(fields)}"
  return f"{OFF_PROTOCOL} [{footnotes.setdefault(note, len(footnotes) + 1)}]"


def _departures_text(fields: Sequence[Departure]) -> str:
  listed = [str(departure) for departure in fields[:LISTED_DEPARTURES]]
  more = len(fields) - len(listed)
  return ", ".join(listed) + (f", and {more} more" if more else "")


def _source(result: Result) -> str:
  """Returns a footnote on the origin of a number.

  The footnote has the seeds, configs, commits, training time and workdirs of the runs. It also lists the
  fields that the paper does not state, if their values differ from the shipped configs.
  """
  seeds = ", ".join(map(str, result.seeds)) or "unknown"
  facts = [
    f"seed{'s' if len(result.seeds) > 1 else ''} {seeds}",
    f"config {', '.join(result.configs) or 'unknown'}",
    f"commit {', '.join(commit[:12] for commit in result.commits) or 'unknown'}",
    cost(result) if result.seconds is not None else "cost unknown",
  ]
  if result.record.get("encoder") != "scratch" and result.record.get("pretrain") is None:
    facts.append("how its encoder was pretrained is unknown")
  if choices := compare.open_choices(result):
    facts.append(f"left open by the paper: {', '.join(choices)}")
  places = ", ".join(map(str, result.workdirs))
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


def _interval(result: Result, column: Column) -> float | None:
  return None if result.interval is None else _in_unit(result.interval, column)


def _number(value: float | None, interval: float | None, column: Column) -> str:
  """Formats a number with the decimals of its column. Its interval is added if it is large enough.

  A positive number that would be rounded to zero has more decimals, or is 0 if it is below 0.01.
  """
  if value is None:
    return "-"
  text = f"{value:.{column.decimals}f}"
  if 0 < value < 0.5 * 10**-column.decimals:
    text = f"{value:g}" if value >= 0.01 else "0"
  shown = interval is not None and (column.unit != "%" or interval >= SMALLEST_INTERVAL)
  return f"{text} ± {interval:.{column.decimals}f}" if shown else text


def _percent(value: float, interval: float | None) -> str:
  return _number(100 * value, None if interval is None else 100 * interval, Column(""))


def _paper_text(result: Result) -> str:
  """Returns the paper's number for a result, and the tables that have it, such as `74.3 (7, 9, 13)`.

  The text is empty if the paper has no number for the result.
  """
  places: dict[str, list[str]] = {}
  for table, column, cell in compare.in_paper(result):
    places.setdefault(_number(cell.value, cell.interval, column), []).append(table.number)
  return "; ".join(f"{text} ({', '.join(tables)})" for text, tables in places.items())


def _result_facts(result: Result) -> dict[str, Any]:
  """Returns the facts about a result, as one row of CSV or JSON."""
  paper = compare.in_paper(result)
  _, departures = compare.nearest(result)
  record = result.record
  return {
    "task": record["task"],
    "protocol": record["protocol"],
    "variation": protocol(result),
    "data": result.data,
    "encoder": record.get("encoder"),
    "network": network(result.config),
    "pretrained_on": record.get("pretrained_on"),
    "labels": record.get("labels"),
    "split": record["split"],
    "metric": record["metric"],
    "paper": next((_fraction(cell.value, column) for _, column, cell in paper), None),
    "paper_tables": [table.number for table, _, _ in paper],
    "off_protocol": [str(departure) for departure in departures],
    "value": result.value,
    "interval": result.interval,
    "n": result.n,
    "seeds": list(result.seeds),
    "step": record.get("step"),
    "rate": record.get("rate"),
    "chosen": record.get("chosen"),
    "configs": list(result.configs),
    "commits": list(result.commits),
    "seconds": result.seconds,
    "devices": record.get("devices"),
    "workdirs": [str(workdir) for workdir in result.workdirs],
  }


def _fraction(value: float | None, column: Column) -> float | None:
  return round(value / 100, 6) if value is not None and column.unit == "%" else value


def _cell_facts(
  table: Table,
  row: Row,
  column: Column,
  cell: Cell,
  results: Sequence[Result],
  candidates: Sequence[Result],
) -> dict[str, Any]:
  """Returns the facts about a cell of a table, as one row of CSV or JSON.

  The key `measured` has the values of the `results` that have all settings of this cell. The key
  `off_protocol` has the values of the `candidates` that have these settings except for some protocol
  fields. A protocol field does not distinguish the rows of the table. The key `off_protocol_fields` has
  the names and values of the differing fields.
  """
  off_protocol = compare.off_protocol(table, row, column, candidates)
  matching = compare.of_cell(table, row, column, results)
  status = table.status(row, column)
  return {
    **dict(zip(table.headings, row.labels, strict=True)),
    "column": column.title,
    "unit": column.unit,
    "better": "higher" if column.higher_is_better else "lower",
    "paper": cell.value,
    "paper_interval": cell.interval,
    "status": ("measured" if matching else NOT_RUN) if status == MEASURABLE else status,
    "measured": [round(_in_unit(result.value, column), 6) for result in matching],
    "interval": [_interval(result, column) for result in matching],
    "n": [result.n for result in matching],
    "configs": [", ".join(result.configs) for result in matching],
    "commits": [", ".join(result.commits) for result in matching],
    "seconds": [result.seconds for result in matching],
    "devices": [result.record.get("devices") for result in matching],
    "workdirs": [", ".join(map(str, result.workdirs)) for result in matching],
    "off_protocol": [round(_in_unit(result.value, column), 6) for result, _ in off_protocol],
    "off_protocol_fields": [", ".join(map(str, fields)) for _, fields in off_protocol],
  }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows as CSV. The elements of a list are joined by semicolons. None becomes an empty text."""
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
  """Formats a grid (rows of text cells) as text or Markdown, with a caption above and notes below.

  Args:
    grid: rows of cells; the first row has the headings.
    notes: lines below the grid.
    style: output format, "text" or "markdown".
    numbers: headings of the columns that are aligned to the right.
    caption: line above the grid; "" if there is none.
  """
  if style == "markdown":
    sections = [f"**{_escape(caption)}**" if caption else "", _markdown(grid, numbers)]
    sections += [_escape(note) for note in notes]
  else:
    sections = [caption, _aligned(grid, numbers), "\n".join(notes)]
  return "\n\n".join(filter(None, sections)) + "\n"


def _aligned(grid: Grid, numbers: set[str]) -> str:
  """Formats a grid (rows of text cells) as aligned text.

  Columns whose heading is in `numbers` are aligned to the right.
  """
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
  """Escapes the characters that have a meaning in Markdown, and joins the lines of the text."""
  return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(text.split()))
