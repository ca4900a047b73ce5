"""What a launcher starts: one `byolx train` or, of a grid, several; checked before it costs money."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from byolx.core.config import ConfigError, flatten, load
from byolx.sweeps import grids

FAILED, USAGE, STOPPED, INTERRUPTED = 1, 2, 75, 130
"""Exit codes of `byolx`, which are the launchers' as well; 75: the same command again."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One run.

  Args:
    name: of the cell of a grid; empty for a single run.
    config: FILE[:ARGS].
    overrides: `--config.FIELD=VALUE`, the grid's after those of the command line.
    workdir: a folder or gs://BUCKET/FOLDER.
  """

  name: str
  config: str
  overrides: tuple[str, ...]
  workdir: str

  def train(self) -> list[str]:
    """The arguments of `byolx`."""
    return ["train", f"--config={self.config}", *self.overrides, f"--workdir={self.workdir}"]

  def text_fields(self) -> dict[str, str]:
    """The config's fields that hold text."""
    flat = flatten(load(self.config, self.overrides))
    return {name: value for name, value in flat.items() if isinstance(value, str)}

  def moved(self, folder: Callable[[str, str], str]) -> "Job":
    """The job with another folder for every gs:// address.

    Args:
      folder: from the name of a field, or `workdir`, and an address, to what stands in its place.

    Raises:
      ConfigError: an address that is none.
    """
    given = {name: value for name, value in self.text_fields().items() if value[:3] == "gs:"}
    for name, value in {"--workdir": self.workdir, **given}.items():
      if value[:3] == "gs:" and not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/[^\s\"'`$\\]+", value):
        raise ConfigError(f"{name}={value}: expected gs://BUCKET/FOLDER")
    kept = [word for word in self.overrides if _field(word) not in given]
    new = [f"--config.{name}={folder(name, value)}" for name, value in given.items()]
    workdir = self.workdir
    if workdir[:3] == "gs:":
      workdir = folder("workdir", workdir)
    return dataclasses.replace(self, overrides=(*kept, *new), workdir=workdir)


def _field(override: str) -> str:
  return override.removeprefix("--config.").partition("=")[0]


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line; argparse would print the usage before it."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
  """A parser with the arguments that all launchers take."""
  made = _Parser(
    prog=program,
    description=description,
    epilog=f"examples:\n{examples}\n\ngrids: {', '.join(grids.GRIDS)}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  made.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARGS]",
    help="as for `byolx train`; --config.FIELD=VALUE changes a field",
  )
  made.add_argument(
    "--workdir", required=True, help="of the run; of a grid: of its runs, one folder each"
  )
  made.add_argument("--grid", metavar="NAME", help="several runs: see byolx/sweeps/grids.py")
  made.add_argument("--dry_run", action="store_true", help="print what would be done, do nothing")
  return made


def parse(
  made: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """Arguments, and apart from them every `--config.FIELD=VALUE`."""
  arguments, rest = made.parse_known_args(list(argv))
  for word in rest:
    if not word.startswith("--config."):
      made.error(f"unknown argument {word}")
    if "=" not in word:
      made.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def jobs(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[Job]:
  """The runs that the arguments ask for, each with a config that is known to load.

  Raises:
    ConfigError: unknown grid, or a config that cannot be.
  """
  cells = grids.named(arguments.grid).cells if arguments.grid else [{}]
  made = []
  for cell in cells:
    name = grids.label(cell)
    workdir = f"{arguments.workdir.rstrip('/')}/{name}" if name else arguments.workdir
    job = Job(name, arguments.config, (*overrides, *grids.overrides(cell)), workdir)
    load(job.config, job.overrides)
    made.append(job)
  return made


def run(program: str, launch: Callable[[], int]) -> int:
  """Calls a launcher; a user's mistake is one line and exit code 2."""
  try:
    return launch()
  except ConfigError as error:
    print(f"{program}: error: {error}", file=sys.stderr)
    return USAGE


def xmanager() -> tuple[ModuleType, ModuleType]:
  """xmanager's modules `xm` and `xm_local`, ready for use without an absl main.

  Raises:
    ConfigError: it is not installed.
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
