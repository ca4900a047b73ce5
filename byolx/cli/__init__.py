"""The `byolx` command. Each subcommand is a module, and it imports the library only when it runs."""

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from byolx.cli import (
  bench,
  evaluate,
  fields,
  inspect,
  plan,
  prepare,
  report,
  show_views,
  sweep,
  train,
)
from byolx.cli.options import FAILED, INTERRUPTED, STOPPED, USAGE

_COMMANDS = (train, evaluate, sweep, report, plan, show_views, prepare, bench, inspect, fields)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `byolx` with command-line arguments and returns the exit code, 0 for success.

  The other exit codes are FAILED, USAGE (invalid arguments or config), INTERRUPTED (Ctrl-C) and
  STOPPED. After STOPPED, the same command continues the run. Unexpected errors are raised.

  Args:
    argv: command-line arguments, such as ["fields"]; None for those of this process.
  """
  arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
  logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
  logging.getLogger("byolx").setLevel(logging.INFO)
  _parse_absl_flags()
  # Imported late, because `byolx --help` should not wait for jax.
  from byolx.core import distributed
  from byolx.core.config import ConfigError
  from byolx.core.signals import StoppedError
  from byolx.planning import tpu

  tpu.quieten()
  try:
    code = arguments.run(arguments, overrides)
  except ConfigError as error:
    return _fail(error, USAGE)
  except StoppedError as error:
    return _stop(str(error), INTERRUPTED if error.by_keyboard else STOPPED)
  except KeyboardInterrupt:
    return _stop("stopped by Ctrl-C", INTERRUPTED)
  except Exception as error:
    if isinstance(error, _expected_errors()):
      return _fail(error, FAILED)
    if distributed.count() > 1:
      distributed.await_reason()
      traceback.print_exc()
      _fail(error, FAILED)
    raise
  distributed.finish()
  return code


def _expected_errors() -> tuple[type[Exception], ...]:
  """Returns the error classes that are printed in one line, without a traceback.

  The classes are imported inside this function, because importing their modules takes long.
  """
  from byolx.checkpoints.manager import CheckpointError
  from byolx.core.distributed import DistributedError
  from byolx.data.unreadable import TooManyFailuresError
  from byolx.training.loop import DivergedError

  return CheckpointError, DivergedError, DistributedError, TooManyFailuresError, OSError


class _Parser(argparse.ArgumentParser):
  """Argument parser that prints an error in one line. It does not print the usage text."""

  def error(self, message: str) -> NoReturn:
    self.exit(USAGE, f"byolx: error: {message}; see {self.prog} --help\n")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = _Parser(
    prog="byolx",
    description="BYOL in Flax NNX: pretrain image encoders without labels, and measure them.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, run, summary: str, **texts) -> argparse.ArgumentParser:
    sub = commands.add_parser(
      name,
      help=summary,
      description=texts.get("description", summary),
      epilog=texts.get("epilog"),
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    sub.set_defaults(run=run)
    return sub

  for module in _COMMANDS:
    module.add(command)
  arguments, rest = parser.parse_known_args(argv)
  for word in rest:
    if "config" not in arguments or not word.startswith("--config."):
      commands.choices[arguments.command].error(f"unknown argument {word}")
    if "=" not in word:
      parser.error(f"{word}: expected --config.FIELD=VALUE")
  return arguments, rest


def _parse_absl_flags() -> None:
  """Marks absl's flags as parsed, because grain's worker processes read them.

  absl's own main function usually marks them, but `byolx` does not use that function.
  """
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _fail(error: Exception, code: int) -> int:
  """Prints an error and returns the exit code.

  If the run has several processes, the function does not return. It ends all of them.

  Args:
    error: error to print.
    code: exit code.
  """
  from byolx.core import distributed

  print(f"byolx: error: {distributed.prefix()}{error}", file=sys.stderr)
  distributed.leave(code, f"failed: {str(error) or type(error).__name__}")
  return code


def _stop(reason: str, code: int) -> int:
  """Prints why a run stops, and returns the exit code.

  If the run has several processes, the function does not return. It ends all of them.

  Args:
    reason: reason for the stop, such as a signal.
    code: exit code.
  """
  from byolx.core import distributed

  advice = "the same command goes on from there"
  print(f"\nbyolx: {distributed.prefix()}{reason}; {advice}", file=sys.stderr)
  distributed.leave(code, f"ended: {reason}")
  return code
