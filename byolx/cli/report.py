"""`byolx report`: prints the results of runs beside the paper's results."""

import argparse
from pathlib import Path

_REPORT = """\
Print the results of runs beside the paper's: protocol, data, encoder, labels, the paper's number,
the measured number with its interval, config, commit and cost. Results that differ only in the seed
are averaged; an interval is half of the range over seeds, as in the paper's appendix G.

A WORKDIR is the workdir of a run or of a sweep, or a folder of them. For a sweep, the results of
its final tests are reported.

--table=N prints a table of the paper with the measured numbers beside its columns, and "not run"
where no WORKDIR has a result. It needs no WORKDIR.

A result stands beside a number of the paper only if its run and the pretraining of its encoder
follow the paper's protocol in every field. Other results are listed below as off protocol, with the
fields that differ.
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
  """Adds the command `byolx report` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command(
    "report",
    _run,
    "print the results of runs and sweeps beside the paper's; draw a figure",
    description=_REPORT,
    epilog=_REPORT_MORE,
  )
  sub.add_argument("workdirs", type=Path, nargs="*", metavar="WORKDIR")
  sub.add_argument(
    "--table", metavar="N", help="table of the paper, such as 9 or 14a; `list` prints the names"
  )
  sub.add_argument(
    "--format",
    choices=("text", "markdown", "csv", "json"),
    help="format of the output; default: by the suffix of --output, or text",
  )
  sub.add_argument(
    "--output",
    type=Path,
    metavar="FILE",
    help="file of the output: .txt, .md, .csv, .json or .png; default: stdout",
  )
  sub.add_argument(
    "--figure",
    type=Path,
    metavar="FILE.png",
    help="file of a figure: accuracy over the share of labels (Figure 4), or one bar per protocol",
  )
  sub.add_argument(
    "--all",
    action="store_true",
    help="also report every cell of a sweep, every rate, and results on validation images",
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.core import files
  from byolx.core.config import ConfigError
  from byolx.reports import compare, figures, measurements, paper, tables

  style, figure = _outputs(arguments)
  if not arguments.workdirs and (figure or not arguments.table):
    prefix, alternative = (f"{figure}: ", "") if figure else ("", ", or --table=N")
    raise ConfigError(f"{prefix}no WORKDIR was given; expected at least one{alternative}")
  listed = arguments.table == "list"
  if arguments.table and not listed and arguments.table not in paper.TABLES:
    choices = ", ".join(paper.TABLES)
    raise ConfigError(f"--table={arguments.table}: expected one of {choices}; or list")
  measured = measurements.read(arguments.workdirs, arguments.all)
  results = compare.results(measured, arguments.all)
  if arguments.workdirs and not results:
    raise ConfigError(
      f"{', '.join(map(str, arguments.workdirs))}: no result on test images; --all also shows those "
      "on validation images"
    )
  if figure:
    figures.draw(results, figure)
    print(f"wrote {figure}")
  if style is None:
    return 0
  if listed:
    page = tables.tables_page()
  elif arguments.table:
    page = tables.table_page(paper.TABLES[arguments.table], results, style)
  else:
    page = tables.results_page(results, style)
  if arguments.output:
    files.write_atomically(arguments.output, page)
    print(f"wrote {arguments.output}")
  else:
    print(page, end="")
  return 0


def _outputs(arguments: argparse.Namespace) -> tuple[str | None, Path | None]:
  """Returns the format of the text output and the path of the figure, from the arguments.

  The format is None if the command draws only a figure. The path is None if it draws no figure.

  Raises:
    ConfigError: the name of a file does not end in an expected suffix, or arguments contradict each
      other.
  """
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
