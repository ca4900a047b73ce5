"""Executes `byolx sweep`: trains all cells, chooses on validation images, and tests the chosen cells.

A cell is one setting of the varied config fields.
"""

import json
import shlex
from collections.abc import Callable, Sequence

from byolx.core import files
from byolx.core.signals import Stop, StoppedError
from byolx.sweeps import record
from byolx.sweeps.jobs import Run, run_all
from byolx.sweeps.sweep import Choice, Sweep, cell_run, choose, final_runs, tested, validation


def run(sweep: Sweep, jobs: int) -> list[Run]:
  """Executes a sweep: trains all cells (candidate settings) and tests the best cell of each group.

  Writes and prints the results. Finished runs are skipped, so the same call resumes a stopped sweep.

  Args:
    sweep: the sweep.
    jobs: largest number of runs at the same time.

  Returns:
    The runs that failed. If there are none, results.json is complete.

  Raises:
    ConfigError: the workdir has another sweep or a run, or a run has no validation record to compare.
    StoppedError: a signal stopped the sweep or one of its runs.
  """
  with record.locked(sweep) as sweep_file, Stop() as stop:
    cells = [cell_run(sweep, cell) for cell in sweep.cells]
    print(f"comparing {len(cells)} cells by validation {sweep.by}", flush=True)
    if failed := _stage(cells, jobs, stop, lambda r: _validation(sweep, r.name)):
      return failed
    choices = choose(sweep)
    changed = sweep_file.choose(choices)
    finals = final_runs(sweep, choices)
    for group, choice in choices.items():
      _announce(sweep, group, choice, changed.get(group, ""))
    tests = [r for runs in finals.values() for r in runs]
    print(f"testing the chosen cells: {len(tests)} runs", flush=True)
    if failed := _stage(tests, jobs, stop, lambda r: _tested(sweep, r)):
      return failed
    records = record.summarise(sweep, choices, finals)
    text = json.dumps(records, indent=1) + "\n"
    files.write_atomically(sweep.workdir / "results.json", text)
    sweep_file.finish()
  print(f"\n{record.table(sweep, choices, records)}\n")
  print(f"results.json and {record.SWEEP_FILE} are in {sweep.workdir}")
  return []


def missing(sweep: Sweep) -> list[str]:
  """Returns the commands of the unfinished runs that `run` would start now.

  A cell is one setting of the varied fields. While some cells are not trained, the commands train
  these cells. When all cells are trained, the commands test the chosen cells.

  Raises:
    ConfigError: the workdir has another sweep or a run, or a run has no validation record to compare.
  """
  record.check(sweep)
  unfinished = [r for r in (cell_run(sweep, cell) for cell in sweep.cells) if not r.finished()]
  if not unfinished:
    finals = final_runs(sweep, choose(sweep))
    unfinished = [r for runs in finals.values() for r in runs if not r.finished()]
  return [shlex.join(["byolx", *run.arguments]) for run in unfinished]


def _stage(runs: Sequence[Run], jobs: int, stop: Stop, describe: Callable[[Run], str]) -> list[Run]:
  """Executes runs, and returns those that failed. Finished runs are skipped.

  Raises:
    StoppedError: a signal stopped the sweep before all runs finished, or a signal stopped a run and
      no run failed.
  """
  outcome = run_all(runs, jobs, lambda: bool(stop.name), describe)
  finished = sum(r.finished() for r in runs)
  if finished < len(runs) and (stop.name or not outcome.failed):
    raise StoppedError(stop.name, f"with {finished} of {len(runs)} runs finished")
  return list(outcome.failed)


def _validation(sweep: Sweep, label: str) -> str:
  return f"validation {sweep.by.metric} {sweep.by.show(validation(sweep, label)['value'])}"


def _tested(sweep: Sweep, run: Run) -> str:
  values = [f"{x['metric']} {sweep.by.show(x['value'])}" for x in tested(run)]
  return f"test {', '.join(values)}"


def _announce(sweep: Sweep, group: str, choice: Choice, earlier: str) -> None:
  value = sweep.by.show(choice.record["value"])
  print(f"{group}: {choice.cell.label} is the best of {len(choice.validation)}, {value}")
  if earlier:
    print(f"{group}: the earlier choice was {earlier}, which may have been tested already")
  for edge in choice.edges:
    print(f"{group}: the best is at an edge of the grid: {edge}; extend the grid", flush=True)
