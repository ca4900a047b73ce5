"""What several commands share: exit codes, options, joining other processes."""

import argparse
import logging
import os
import sys

from byolx.cli import numbers

USAGE = 2
FAILED = 1
STOPPED = 75  # EX_TEMPFAIL: start the same command again
INTERRUPTED = 130

CONFIG_HELP = "config file, with arguments after a colon; --config.FIELD=VALUE changes a field"


def add_distributed(sub: argparse.ArgumentParser) -> None:
  """The options of a command that several processes may run together."""
  sub.add_argument(
    "--distributed",
    action="store_true",
    help="be one of several processes; enough on TPU pods and in clusters such as SLURM's",
  )
  sub.add_argument(
    "--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens, and"
  )
  sub.add_argument("--processes", type=numbers.count, metavar="N", help="how many there are, and")
  sub.add_argument("--process", type=numbers.index, metavar="I", help="which one this is, from 0")
  sub.add_argument(
    "--peer_timeout",
    type=numbers.seconds,
    default=30.0,
    help="seconds after which a silent process counts as lost; default: 30",
  )


def join(arguments: argparse.Namespace) -> None:
  """Joins the other processes, if there are any; then only the writer prints to stdout."""
  from byolx.core import distributed
  from byolx.core.config import ConfigError

  where = (arguments.coordinator, arguments.processes, arguments.process)
  if not arguments.distributed:
    if any(value is not None for value in where):
      raise ConfigError("--coordinator, --processes and --process: expected with --distributed")
    return
  try:
    distributed.initialise(*where, peer_timeout=arguments.peer_timeout)
  except ValueError as error:
    raise ConfigError(f"--distributed: {error}") from None
  if distributed.count() > 1:
    logging.basicConfig(format=f"process {distributed.index()}: %(message)s", force=True)
  if not distributed.is_writer():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
