"""`byolx eval`: evaluates the newest checkpoint of a run again."""

import argparse
from pathlib import Path

from byolx.cli import options


def add(command) -> None:
  """Adds the command `byolx eval` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command("eval", _run, "evaluate the newest checkpoint of a workdir again")
  sub.add_argument(
    "--from", dest="workdir", type=Path, required=True, metavar="WORKDIR", help="workdir of a run"
  )
  sub.add_argument(
    "--test", action="store_true", help="evaluate on the test images, even if the run did not"
  )
  sub.add_argument(
    "--tasks", metavar="FILE", help="Python file that registers the run's task, if it is your own"
  )
  options.add_distributed(sub)


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import config, run

  options.join(arguments)
  if arguments.tasks:
    config.run_file(arguments.tasks, "--tasks")
  run.evaluate_run(arguments.workdir, arguments.test)
  return 0
