"""`byolx inspect`: prints the contents of a run's folder or of a checkpoint."""

import argparse
from pathlib import Path

from byolx.cli import options


def add(command) -> None:
  """Adds the command `byolx inspect` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command("inspect", _run, "print the contents of a workdir or a checkpoint on one page")
  sub.add_argument("path", type=Path, metavar="WORKDIR|CHECKPOINT")
  sub.add_argument("--verify", action="store_true", help="read every array and compare checksums")
  sub.add_argument(
    "--json", type=Path, metavar="FILE", help="file to which the page is written as well"
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.checkpoints import inspection
  from byolx.core import files
  from byolx.runs import config, schema

  defaults, encoder_fields = config.flatten(config.defaults()), list(schema.encoder_fields())
  page = inspection.inspect(arguments.path, defaults, encoder_fields, arguments.verify)
  print(page.text())
  if arguments.json:
    files.write_atomically(arguments.json, page.json())
  return options.FAILED if page.damaged else 0
