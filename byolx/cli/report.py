"""`byolx report`."""

import argparse
from pathlib import Path

_REPORT = """\
What runs measured, with what the paper has for it: protocol, data, encoder, labels, the paper's
number, ours with its interval, config, commit and cost. Results that differ only in seeds are
averaged; an interval is half of the range over seeds, as in the paper's appendix G.

Give workdirs of runs or sweeps, or folders of them. Of a sweep, its own results are reported.

With --table=N: a table of the paper, what was measured beside its columns, and "not run" where no
given workdir has it. No workdir is needed.

A result stands beside a number of the paper only if its run and the pretraining of its encoder have
every value of the paper's protocol. Results that differ in the protocol are listed below as off
protocol, with the fields that differ.
"""
_REPORT_MORE = """\
examples:
  byolx report runs/linear
  byolx report runs --output=results.md --figure=results.png
  byolx report --table=list
  byolx report --table=9
  byolx report runs --table=14a --format=markdown
"""
_SUFFIXES = {".txt": "text", ".md": "markdown", ".csv": "csv", ".json": "json", ".png": "png"}


def add(command) -> None:
  """Adds the command; see `byolx.cli.main`."""
  sub = command(
    "report",
    _run,
    "results of runs and sweeps beside the paper's; tables and a figure",
    description=_REPORT,
    epilog=_REPORT_MORE,
  )
  sub.add_argument("workdirs", type=Path, nargs="*", metavar="WORKDIR")
  sub.add_argument("--table", metavar="N", help="of the paper, such as 9 or 14a; `list` lists them")
  sub.add_argument(
    "--format",
    choices=("text", "markdown", "csv", "json"),
    help="default: as --output is called, or text",
  )
  sub.add_argument(
    "--output", type=Path, metavar="FILE", help="write it there: .txt, .md, .csv, .json, .png"
  )
  sub.add_argument(
    "--figure",
    type=Path,
    metavar="FILE.png",
    help="draw accuracy over the share of labels (Figure 4), or a bar for each protocol",
  )
  sub.add_argument(
    "--all",
    action="store_true",
    help="every cell of a sweep, every rate, and the validation images' results as well",
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.core import files
  from byolx.core.config import ConfigError
  from byolx.reports import compare, figures, measurements, paper, tables

  style, figure = _outputs(arguments)
  if not arguments.workdirs and (figure or not arguments.table):
    asked = f"{figure} is drawn from" if figure else "expected at least one, or"
    rest = "results" if figure else "--table=N, a table of the paper"
    raise ConfigError(f"no WORKDIR was given; {asked} {rest}")
  listed = arguments.table == "list"
  if arguments.table and not listed and arguments.table not in paper.TABLES:
    choices = ", ".join(paper.TABLES)
    raise ConfigError(f"--table={arguments.table}: expected one of {choices}; or list")
  measured = measurements.read(arguments.workdirs, arguments.all)
  found = compare.results(measured, arguments.all)
  if arguments.workdirs and not found:
    raise ConfigError(
      f"{', '.join(map(str, arguments.workdirs))}: no result on test images; --all also shows those "
      "on validation images"
    )
  if figure:
    figures.draw(found, figure)
    print(f"wrote {figure}")
  if style is None:
    return 0
  if listed:
    page = tables.tables_page()
  elif arguments.table:
    page = tables.table_page(paper.TABLES[arguments.table], found, style)
  else:
    page = tables.results_page(found, style)
  if arguments.output:
    files.write_atomically(arguments.output, page)
    print(f"wrote {arguments.output}")
  else:
    print(page, end="")
  return 0


def _outputs(arguments: argparse.Namespace) -> tuple[str | None, Path | None]:
  """The format of what is printed or written, None if only a figure is; and the figure's path."""
  from byolx.core.config import ConfigError

  suffix = arguments.output.suffix.lower() if arguments.output else ".txt"
  style = _SUFFIXES.get(suffix)
  if arguments.figure and arguments.figure.suffix.lower() != ".png":
    raise ConfigError(f"--figure={arguments.figure}: expected a name that ends in .png")
  if style == "png":
    if arguments.figure or arguments.table or arguments.format:
      raise ConfigError(
        f"--output={arguments.output}: a figure; expected it without --figure, --table and --format"
      )
    return None, arguments.output
  if style is None and arguments.format is None:
    choices = ", ".join(_SUFFIXES)
    raise ConfigError(
      f"--output={arguments.output}: unknown format; expected a name that ends in one of {choices}, "
      "or --format"
    )
  return arguments.format or style, arguments.figure
