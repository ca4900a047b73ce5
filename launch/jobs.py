"""Jobs of a launcher, each a `byolx train` with a checked config: one, or one per grid cell."""

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
"""Exit codes of `byolx` and of the launchers; after 75 the same command continues the run."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One run.

  Args:
    name: name of the grid's cell; empty for a single run.
    config: config file and its arguments, FILE[:ARGS].
    overrides: arguments `--config.FIELD=VALUE`; those of the grid come last.
    workdir: folder, or gs://BUCKET/FOLDER.
  """

  name: str
  config: str
  overrides: tuple[str, ...]
  workdir: str

  def train(self) -> list[str]:
    """Arguments of `byolx` for this run."""
    return ["train", f"--config={self.config}", *self.overrides, f"--workdir={self.workdir}"]

  def text_fields(self) -> dict[str, str]:
    """Values of the config's text fields, by name."""
    flat = flatten(load(self.config, self.overrides))
    return {name: value for name, value in flat.items() if isinstance(value, str)}

  def moved(self, folder: Callable[[str, str], str]) -> "Job":
    """Job with a folder in place of every gs:// address.

    Args:
      folder: function from the name of a field, or `workdir`, and its address to the folder.

    Raises:
      ConfigError: an address that begins with gs: is not gs://BUCKET/FOLDER.
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
  return override.removeprefix("--config.").partition("=")[0]


class _Parser(argparse.ArgumentParser):
  """Parser that prints an error in one line, without argparse's usage before it."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
  """Parser with the arguments that all launchers have."""
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
  """Parsed arguments, and the list of the arguments `--config.FIELD=VALUE`."""
  arguments, rest = parser.parse_known_args(list(argv))
  for word in rest:
    if not word.startswith("--config."):
      parser.error(f"unknown argument {word}")
    if "=" not in word:
      parser.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def jobs(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
  """Jobs of a command, after loading the config of each.

  Args:
    arguments: arguments of `parser`.
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
  """Run a launcher and return its exit code; a ConfigError gives one line and exit code 2."""
  try:
    return launch()
  except ConfigError as error:
    print(f"{program}: error: {error}", file=sys.stderr)
    return USAGE


def xmanager() -> tuple[ModuleType, ModuleType]:
  """Import the modules `xm` and `xm_local` of xmanager, for use without an absl main.

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
