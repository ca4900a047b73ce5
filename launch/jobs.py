"""Jobs of the launchers: a job is one `byolx train` command with a checked config.

A launch has one job, or one job for each cell of a grid of configs.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from byolx.core.config import ConfigError, flatten
from byolx.runs.config import load
from byolx.sweeps import grids

FAILED, USAGE, STOPPED, INTERRUPTED = 1, 2, 75, 130
"""Exit codes of `byolx` and of the launchers: 1 for a failure, 2 for invalid arguments, 75 for a run
that the same command continues, 130 after Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of `byolx train`.

  Args:
    name: name of the grid cell that gives the config its values; empty for a run without a grid.
    config: config file and its arguments, FILE[:ARGS].
    overrides: arguments `--config.FIELD=VALUE`; those from the grid come last.
    workdir: folder of the run, a path or gs://BUCKET/FOLDER.
  """

  name: str
  config: str
  overrides: tuple[str, ...]
  workdir: str

  def train(self) -> list[str]:
    """Returns the arguments of `byolx` that start this run."""
    return ["train", f"--config={self.config}", *self.overrides, f"--workdir={self.workdir}"]

  def text_fields(self) -> dict[str, str]:
    """Loads the config and returns the values of all fields that are strings, by field name."""
    flat = flatten(load(self.config, self.overrides))
    return {name: value for name, value in flat.items() if isinstance(value, str)}

  def moved(self, folder: Callable[[str, str], str]) -> "Job":
    """Returns a copy of the job in which every gs:// address is replaced by a folder.

    Args:
      folder: function that returns the folder. Its arguments are the name of the config field, or
        `workdir`, and the address.

    Raises:
      ConfigError: an address begins with gs: but has not the form gs://BUCKET/FOLDER.
    """
    addresses = {name: value for name, value in self.text_fields().items() if value[:3] == "gs:"}
    for name, value in {"--workdir": self.workdir, **addresses}.items():
      if value[:3] == "gs:" and not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^\s\"'`$\\]+", value):
        raise ConfigError(f"{name}={value}: expected gs://BUCKET/FOLDER")
    kept = [word for word in self.overrides if _field(word) not in addresses]
    new = [f"--config.{name}={folder(name, value)}" for name, value in addresses.items()]
    workdir = self.workdir
    if workdir[:3] == "gs:":
      workdir = folder("workdir", workdir)
    return dataclasses.replace(self, overrides=(*kept, *new), workdir=workdir)


def _field(override: str) -> str:
  """Returns the field's name in an argument `--config.FIELD=VALUE`."""
  return override.removeprefix("--config.").partition("=")[0]


class _Parser(argparse.ArgumentParser):
  """Argument parser that prints an error in one line, without the usage that argparse adds."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
  """Creates the parser of a launcher, with the arguments that all launchers have.

  Args:
    program: path of the launcher, such as launch/xm_local.py.
    description: text of the help before the arguments.
    examples: example commands for the end of the help.
  """
  parser = _Parser(
    prog=program,
    description=description,
    epilog=f"examples:\n{examples}\n\ngrids: {', '.join(grids.GRIDS)}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARGS]",
    help="config file and arguments, as for `byolx train`; --config.FIELD=VALUE changes a field",
  )
  parser.add_argument(
    "--workdir", required=True, help="folder of the run; with --grid, each run has a folder in it"
  )
  parser.add_argument(
    "--grid", metavar="NAME", help="named grid of runs, see byolx/sweeps/grids.py"
  )
  parser.add_argument(
    "--dry_run", action="store_true", help="print the actions without performing them"
  )
  return parser


def parse(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """Parses the arguments of a launcher; exits with an error message if one is invalid.

  Returns the parsed arguments, and the list of all arguments `--config.FIELD=VALUE`.
  """
  arguments, rest = parser.parse_known_args(list(argv))
  for word in rest:
    if not word.startswith("--config."):
      parser.error(f"unknown argument {word}")
    if "=" not in word:
      parser.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def jobs(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
  """Returns the jobs of a launch: one, or one for each cell of `--grid`; checks their configs.

  Args:
    arguments: parsed arguments of a launcher.
    overrides: arguments `--config.FIELD=VALUE`.

  Raises:
    ConfigError: the grid is unknown, or a config is not valid.
  """
  cells = grids.named(arguments.grid).cells if arguments.grid else [{}]
  result = []
  for cell in cells:
    name = grids.label(cell)
    workdir = f"{arguments.workdir.rstrip('/')}/{name}" if name else arguments.workdir
    job = Job(name, arguments.config, (*overrides, *grids.overrides(cell)), workdir)
    load(job.config, job.overrides)
    result.append(job)
  return result


def run(program: str, launch: Callable[[], int]) -> int:
  """Calls a launcher's function and returns its exit code; prints a ConfigError and returns 2.

  Args:
    program: path of the launcher for the message, such as launch/xm_local.py.
    launch: function that does the work and returns the exit code.
  """
  try:
    return launch()
  except ConfigError as error:
    print(f"{program}: error: {error}", file=sys.stderr)
    return USAGE


def xmanager() -> tuple[ModuleType, ModuleType]:
  """Imports xmanager and returns its modules `xm` and `xm_local`.

  Also marks absl's flags as parsed, because xmanager reads them and the launchers do not use absl's
  own main function.

  Raises:
    ConfigError: xmanager is not installed.
  """
  try:
    from absl import flags
    from xmanager import xm, xm_local
  except ImportError as error:
    raise ConfigError(
      f"xmanager is not installed ({error}); install it with: pip install '.[launch]'"
    ) from None
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return xm, xm_local
