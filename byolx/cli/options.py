"""Exit codes and options that several `byolx` commands share, such as `--distributed`."""

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
  """Adds the options for running a command in several processes, such as `--distributed`.

  Args:
    sub: parser of the command.
  """
  sub.add_argument(
    "--distributed",
    action="store_true",
    help="run as one of several processes; enough on TPU pods and in clusters such as SLURM",
  )
  sub.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="address of process 0; only where it is not detected, with the next two",
  )
  sub.add_argument("--processes", type=numbers.count, metavar="N", help="number of processes")
  sub.add_argument(
    "--process", type=numbers.index, metavar="I", help="index of this process, from 0"
  )
  sub.add_argument(
    "--peer_timeout",
    type=numbers.seconds,
    default=30.0,
    help="seconds without a signal after which a process counts as lost; default: 30",
  )


def join(arguments: argparse.Namespace) -> None:
  """Connects this process to the other processes of the run, if `--distributed` is given.

  Afterwards only process 0 prints to stdout.

  Args:
    arguments: parsed arguments, including the options that `add_distributed` adds.

  Raises:
    ConfigError: the options contradict each other, or the processes cannot be detected.
  """
  from byolx.core import distributed
  from byolx.core.config import ConfigError

  group = (arguments.coordinator, arguments.processes, arguments.process)
  if not arguments.distributed:
    if any(value is not None for value in group):
      raise ConfigError("--coordinator, --processes and --process: expected with --distributed")
    return
  try:
    distributed.initialise(*group, peer_timeout=arguments.peer_timeout)
  except ValueError as error:
    raise ConfigError(f"--distributed: {error}") from None
  if distributed.count() > 1:
    logging.basicConfig(format=f"process {distributed.index()}: %(message)s", force=True)
  if not distributed.is_writer():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
