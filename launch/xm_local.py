"""Trains on this machine through xmanager: one run, or the runs of a grid side by side."""

import argparse
import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

import jobs
from jobs import FAILED, INTERRUPTED, Job, xmanager

from byolx.cli import numbers
from byolx.core import machine
from byolx.core.config import ConfigError

PROGRAM = "launch/xm_local.py"

_DESCRIPTION = """\
Train on this machine with xmanager, which keeps a record of experiments: one run, or all runs of a grid,
as many side by side as there are cores for. Needs: pip install ".[launch]"
"""
_EXAMPLES = """\
  python launch/xm_local.py --config=configs/quickstart.py --workdir=runs/seeds --grid=seeds
  python launch/xm_local.py --config=configs/quickstart.py --workdir=runs/rates --grid=table15_rate \\
    --cores=2 --config.train.epochs=20"""


def main(argv: Sequence[str] | None = None) -> int:
  """Launches; returns 0, 1 where a run failed, or 2 for a wrong command."""
  parser = jobs.parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
  parser.add_argument(
    "--cores", type=numbers.count, help="of each run; default: 1 with --grid, else all"
  )
  arguments, overrides = jobs.parse(parser, sys.argv[1:] if argv is None else argv)
  return jobs.run(PROGRAM, lambda: _launch(arguments, overrides))


def slots(cores: Sequence[int], each: int) -> list[list[int]]:
  """Cores shared out: lists of `each` cores, for runs side by side.

  Raises:
    ConfigError: there are not that many.
  """
  if each > len(cores):
    raise ConfigError(f"--cores={each}: expected at most the {len(cores)} of this machine")
  return [list(cores[i : i + each]) for i in range(0, len(cores) - each + 1, each)]


def command(job: Job, cores: Sequence[int]) -> list[str]:
  """The command of a run that stays on these cores, where the system can do that."""
  pin = shutil.which("taskset")
  train = [sys.executable, "-m", "byolx", *job.train()]
  return [pin, "--cpu-list", ",".join(map(str, cores)), *train] if pin else train


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
  wanted = jobs.jobs(arguments, overrides)
  affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
  cores = sorted(affinity(0)) if affinity else list(range(machine.usable_cores()))
  each = arguments.cores or (1 if arguments.grid else len(cores))
  places = slots(cores, each)
  if arguments.dry_run:
    for number, job in enumerate(wanted):
      print(shlex.join(command(job, places[number % len(places)])))
    return 0
  try:
    failed = _run(f"byolx {arguments.grid or arguments.config}", wanted, places)
  except KeyboardInterrupt:
    print(f"{PROGRAM}: all runs are ended; the same command goes on", file=sys.stderr)
    return INTERRUPTED
  for job in failed:
    print(
      f"{PROGRAM}: error: {job.name or 'the run'} failed; next: {shlex.join(command(job, cores))}",
      file=sys.stderr,
    )
  return FAILED if failed else 0


def _run(title: str, wanted: Sequence[Job], places: Sequence[Sequence[int]]) -> list[Job]:
  """Runs jobs as xmanager's work units, one in each place at a time; returns those that failed."""
  xm, xm_local = xmanager()
  failed = []

  async def work(experiment, job: Job, free: asyncio.Queue) -> None:
    cores = await free.get()
    program, *arguments = command(job, cores)
    [executable] = experiment.package(
      [xm.binary(executor_spec=xm_local.Local.Spec(), path=program, args=arguments)]
    )
    unit = await experiment.add(
      xm.Job(executable=executable, executor=xm_local.Local(), name=job.name or "run")
    )
    try:
      await unit.wait_until_complete()
    except xm.ExperimentUnitError:
      failed.append(job)
    finally:
      free.put_nowait(cores)

  async def every() -> None:
    free: asyncio.Queue = asyncio.Queue()
    for place in places:
      free.put_nowait(place)
    async with xm_local.create_experiment(experiment_title=title) as experiment:
      await asyncio.gather(*(work(experiment, job, free) for job in wanted))

  asyncio.run(every())
  return failed


if __name__ == "__main__":
  sys.exit(main())
