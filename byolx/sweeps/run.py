"""`byolx sweep`: runs what a grid compares, chooses on validation images, tests what was chosen."""

import json
import shlex
from collections.abc import Callable, Sequence

from byolx.core import files
from byolx.core.signals import Stop, StoppedError
from byolx.sweeps import record
from byolx.sweeps.jobs import Run, run_all
from byolx.sweeps.sweep import Choice, Sweep, cell_run, choose, final_runs, tested, validation


def run(sweep: Sweep, jobs: int) -> list[Run]:
  """Runs what is missing, chooses, tests what was chosen, writes and prints the results.

  Returns:
    The runs that failed; none where there are results.

  Raises:
    ConfigError: the workdir holds another sweep, or runs without what is compared.
    StoppedError: by a signal, or since a run was; the same call goes on.
  """
  with record.claimed(sweep) as page, Stop() as stop:
    cells = [cell_run(sweep, cell) for cell in sweep.cells]
    print(f"choosing from {len(cells)} cells by validation {sweep.by}", flush=True)
    if failed := _stage(cells, jobs, stop, lambda r: _validation(sweep, r.name)):
      return failed
    choices = choose(sweep)
    changed = page.choose(choices)
    finals = final_runs(sweep, choices)
    for group, choice in choices.items():
      _announce(sweep, group, choice, changed.get(group, ""))
    every = [r for runs in finals.values() for r in runs]
    print(f"testing what was chosen: {len(every)} runs", flush=True)
    if failed := _stage(every, jobs, stop, lambda r: _tested(sweep, r)):
      return failed
    records = record.summarise(sweep, choices, finals)
    text = json.dumps(records, indent=1) + "\n"
    files.write_atomically(sweep.workdir / "results.json", text)
    page.finish()
  print(f"\n{record.table(sweep, choices, records)}\n")
  print(f"results.json and {record.PAGE} are in {sweep.workdir}")
  return []


def missing(sweep: Sweep) -> list[str]:
  """The commands that `run` would run now: cells, or once all are finished, tests of the chosen."""
  record.check(sweep)
  left = [r for r in (cell_run(sweep, cell) for cell in sweep.cells) if not r.finished()]
  if not left:
    finals = final_runs(sweep, choose(sweep))
    left = [r for runs in finals.values() for r in runs if not r.finished()]
  return [shlex.join(["byolx", *each.arguments]) for each in left]


def _stage(runs: Sequence[Run], jobs: int, stop: Stop, say: Callable[[Run], str]) -> list[Run]:
  """Runs all; returns those that failed, and raises where some were stopped and none failed."""
  outcome = run_all(runs, jobs, lambda: bool(stop.name), say)
  finished = sum(r.finished() for r in runs)
  if finished < len(runs) and (stop.name or not outcome.failed):
    raise StoppedError(stop.name, f"with {finished} of {len(runs)} runs finished")
  return list(outcome.failed)


def _validation(sweep: Sweep, label: str) -> str:
  return f"validation {sweep.by.metric} {sweep.by.show(validation(sweep, label)['value'])}"


def _tested(sweep: Sweep, r: Run) -> str:
  values = [f"{x['metric']} {sweep.by.show(x['value'])}" for x in tested(r)]
  return f"test {', '.join(values)}"


def _announce(sweep: Sweep, group: str, choice: Choice, before: str) -> None:
  value = sweep.by.show(choice.record["value"])
  print(f"{group}: {choice.cell.label} is the best of {len(choice.validation)}, {value}")
  if before:
    print(f"{group}: {before} was before, and may have been tested already")
  for edge in choice.edges:
    print(f"{group}: the best is at an edge of the grid, {edge}; go further", flush=True)
