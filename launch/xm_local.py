"""Trains on this machine with xmanager: one run, or the runs of a grid in parallel."""

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
Train on this machine with xmanager, which records experiments: one run, or all runs of a grid, as
many in parallel as there are cores for. Needs: pip install ".[launch]"
"""
_EXAMPLES = """\
  python launch/xm_local.py --config=configs/quickstart.py --workdir=runs/seeds --grid=seeds
  python launch/xm_local.py --config=configs/quickstart.py --workdir=runs/rates --grid=table15_rate \\
    --cores=2 --config.train.epochs=20"""


def main(argv: Sequence[str] | None = None) -> int:
  """Trains all runs of a launch on this machine and returns the exit code.

  It is 0 if all runs are done, 1 if one failed, 2 for invalid arguments, 130 after Ctrl-C.

  Args:
    argv: command-line arguments; None for those of this process.
  """
  parser = jobs.parser(PROGRAM, _DESCRIPTION, _EXAMPLES)
  parser.add_argument(
    "--cores", type=numbers.count, help="number of cores per run; default: 1 with --grid, else all"
  )
  arguments, overrides = jobs.parse(parser, sys.argv[1:] if argv is None else argv)
  return jobs.run(PROGRAM, lambda: _launch(arguments, overrides))


def slots(cores: Sequence[int], size: int) -> list[list[int]]:
  """Divides the machine's cores into groups, so that each group can train one run at a time.

  Cores that do not fill a group are left out.

  Args:
    cores: indices of the cores.
    size: number of cores of a group.

  Raises:
    ConfigError: the machine has fewer than `size` cores.
  """
  if size > len(cores):
    raise ConfigError(f"--cores={size}: expected at most the {len(cores)} of this machine")
  return [list(cores[i : i + size]) for i in range(0, len(cores) - size + 1, size)]


def command(job: Job, cores: Sequence[int]) -> list[str]:
  """Returns the command of a run, limited to certain cores if the system has `taskset`.

  Args:
    job: run to train.
    cores: indices of the cores.
  """
  pin = shutil.which("taskset")
  train = [sys.executable, "-m", "byolx", *job.train()]
  return [pin, "--cpu-list", ",".join(map(str, cores)), *train] if pin else train


def _launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
  runs = jobs.jobs(arguments, overrides)
  affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
  cores = sorted(affinity(0)) if affinity else list(range(machine.usable_cores()))
  cores_per_run = arguments.cores or (1 if arguments.grid else len(cores))
  core_lists = slots(cores, cores_per_run)
  if arguments.dry_run:
    for number, job in enumerate(runs):
      print(shlex.join(command(job, core_lists[number % len(core_lists)])))
    return 0
  try:
    failed = _run(f"byolx {arguments.grid or arguments.config}", runs, core_lists)
  except KeyboardInterrupt:
    print(f"{PROGRAM}: all runs are stopped; the same command goes on", file=sys.stderr)
    return INTERRUPTED
  for job in failed:
    print(
      f"{PROGRAM}: error: {job.name or 'the run'} failed; next: {shlex.join(command(job, cores))}",
      file=sys.stderr,
    )
  return FAILED if failed else 0


def _run(title: str, runs: Sequence[Job], core_lists: Sequence[Sequence[int]]) -> list[Job]:
  """Trains all runs with xmanager, several in parallel, and returns those that failed.

  Args:
    title: title of xmanager's experiment.
    runs: runs to train.
    core_lists: groups of cores, each of which trains one run at a time.
  """
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

  async def run_all() -> None:
    free: asyncio.Queue = asyncio.Queue()
    for cores in core_lists:
      free.put_nowait(cores)
    async with xm_local.create_experiment(experiment_title=title) as experiment:
      await asyncio.gather(*(work(experiment, job, free) for job in runs))

  asyncio.run(run_all())
  return failed


if __name__ == "__main__":
  sys.exit(main())
