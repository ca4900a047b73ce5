"""Writes the files of a sweep, `sweep.json` and `results.json`, and the table of the chosen cells.

A cell is one setting of the varied config fields. `sweep.json` holds the settings of the sweep. They
are compared with those of a later sweep in the same workdir, and a different sweep is rejected (see
`changes`).
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from byolx.core import files
from byolx.core.config import ConfigError
from byolx.runs import config, results
from byolx.sweeps.jobs import Run
from byolx.sweeps.sweep import Choice, Sweep, tested

SWEEP_FILE = "sweep.json"


class SweepFile:
  """The file `sweep.json`, with the options of a sweep and its chosen cells.

  A cell is one setting of the varied config fields. The file is replaced atomically at each change.

  Args:
    sweep: sweep whose workdir has the file. If the file exists, it must belong to the same sweep.
  """

  def __init__(self, sweep: Sweep):
    self._path = sweep.workdir / SWEEP_FILE
    earlier = _read(self._path)
    self._content = {**_identity(sweep), "chosen": earlier.get("chosen", {}), "finished": False}
    self._write()

  def choose(self, choices: Mapping[str, Choice]) -> dict[str, str]:
    """Writes the chosen cell (candidate setting) of each group to the file.

    Args:
      choices: chosen cell of each group, by the name of the group.

    Returns:
      Labels of the cells that were chosen before, by the name of the group. Only groups with another
      choice than before are included.
    """
    old, new, changed = self._content["chosen"], {}, {}
    for group, choice in choices.items():
      before = old.get(group, {}).get("before", [])
      if group in old and old[group]["label"] != choice.cell.label:
        changed[group] = old[group]["label"]
        before = [*before, changed[group]]
      new[group] = {
        "label": choice.cell.label,
        "cell": choice.cell.fields,
        "at_edge": choice.edges,
        "validation": choice.validation,
        "before": before,
      }
    self._content["chosen"] = new
    self._write()
    return changed

  def finish(self) -> None:
    """Writes to the file that the sweep is finished: all chosen candidates are tested."""
    self._content["finished"] = True
    self._write()

  def _write(self) -> None:
    files.write_atomically(self._path, json.dumps(self._content, indent=1) + "\n")


@contextlib.contextmanager
def locked(sweep: Sweep) -> Iterator[SweepFile]:
  """Creates and locks the workdir of a sweep, and yields its `sweep.json`.

  Raises:
    ConfigError: the workdir belongs to another sweep or to a run, or another process has locked it.
  """
  check(sweep)
  sweep.workdir.mkdir(parents=True, exist_ok=True)
  folder = os.open(sweep.workdir, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f"--workdir={sweep.workdir}: another process runs a sweep there") from None
    check(sweep)
    yield SweepFile(sweep)
  finally:
    os.close(folder)


def check(sweep: Sweep) -> None:
  """Checks that the sweep's workdir does not belong to another sweep or to a run.

  Raises:
    ConfigError: the workdir belongs to another sweep or to a run.
  """
  if (sweep.workdir / "config.json").exists():
    raise ConfigError(
      f"--workdir={sweep.workdir} is the workdir of a run; expected one of a sweep, or a new one"
    )
  earlier = _read(sweep.workdir / SWEEP_FILE)
  if earlier and (changed := changes(earlier, sweep)):
    raise ConfigError(
      f"--workdir={sweep.workdir} holds another sweep ({'; '.join(changed)}); choose another "
      "--workdir, or undo the change"
    )


def changes(earlier: Mapping[str, Any], sweep: Sweep) -> list[str]:
  """Returns the changes that prevent a sweep from continuing an earlier one, as texts.

  The config must be the same, and the grid must keep all cells (settings of the varied fields) that
  have results. If the earlier sweep has already chosen cells, it may also have tested them. Then
  --per, --select and --retrain must be the same, and the earlier seeds must stay. New cells and new
  seeds are always allowed. The list is empty if the sweep can continue.

  Args:
    earlier: content of the earlier sweep's `sweep.json`.
    sweep: the sweep to continue with.
  """
  base = config.flatten(config.from_json(json.dumps(earlier["fields"])))
  differences = config.differences(base, config.flatten(sweep.base))
  labels = {cell.label for cell in sweep.cells}
  differences += [
    f"--grid: without {label}, which has results"
    for label in earlier["cells"]
    if label not in labels and (sweep.workdir / "cells" / label / "results.json").exists()
  ]
  if earlier["chosen"]:
    identity = _identity(sweep)
    differences += [
      f"--{name}: {earlier[name]} -> {identity[name]}"
      for name in ("per", "select", "retrain")
      if earlier[name] != identity[name]
    ]
    if left_out := [seed for seed in earlier["seeds"] if seed not in sweep.seeds]:
      differences.append(f"--seeds: without {', '.join(map(str, left_out))}")
  return differences


def _identity(sweep: Sweep) -> dict[str, Any]:
  return {
    "config": sweep.config,
    "overrides": list(sweep.overrides),
    "fields": config.flatten(sweep.base),
    "cells": {cell.label: cell.fields for cell in sweep.cells},
    "per": list(sweep.per),
    "select": str(sweep.by),
    "seeds": list(sweep.seeds),
    "retrain": sweep.retrain,
  }


def _read(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def summarise(
  sweep: Sweep, choices: dict[str, Choice], finals: dict[str, list[Run]]
) -> list[results.Record]:
  """Averages the test results of each group of candidates over seeds.

  Args:
    sweep: the sweep.
    choices: chosen candidate of each group, by the name of the group.
    finals: finished runs that tested the chosen candidate, by the name of the group. Each group has
      one run per seed.

  Returns:
    Records (dictionaries of one result each) with mean values, for the sweep's results.json. They
    have four further keys: n (number of values), group, cell (varied fields and their values) and
    workdir (workdirs of the runs).
  """
  keys = [key for key in results.KEYS if key != "commit"]
  summary = []
  for group, runs in finals.items():
    records = [
      {**record, "seed": seed}
      for seed, r in zip(sweep.seeds, runs, strict=True)
      for record in tested(r)
    ]
    for mean in results.mean_over_seeds(records, keys):
      folders = [r.workdir for seed, r in zip(sweep.seeds, runs, strict=True)]
      summary.append(
        {
          **mean,
          "n": len(mean["seed"]),
          "group": group,
          "cell": choices[group].cell.fields,
          "workdir": [os.path.relpath(folder, sweep.workdir) for folder in folders],
        }
      )
  return summary


def table(sweep: Sweep, choices: Mapping[str, Choice], records: Sequence[results.Record]) -> str:
  """Returns a text table of the chosen cells (candidate settings), one row per group of candidates.

  Each row has the validation value and the test values of the chosen cell.
  """
  columns = list(dict.fromkeys(_column(record, records) for record in records))
  rows = [["group", "chosen", f"validation {sweep.by.metric}", *(f"test {c}" for c in columns)]]
  for group, choice in choices.items():
    by_column = {_column(r, records): r for r in records if r["group"] == group}
    values = [
      _shown(sweep, by_column[column]) if column in by_column else "-" for column in columns
    ]
    rows.append([group, choice.cell.label, sweep.by.show(choice.record["value"]), *values])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  if len(sweep.seeds) > 1:
    lines.append(f"mean of seeds {', '.join(map(str, sweep.seeds))} ± half their range")
  return "\n".join(lines)


def _column(record: results.Record, records: Sequence[results.Record]) -> str:
  """Returns the heading of the table column for a record, a dictionary of one test result.

  The heading has the metric. If several records of the group have the same metric, the heading also
  has the values in which they differ, such as the protocol.
  """
  alternatives = [
    r for r in records if (r["group"], r["metric"]) == (record["group"], record["metric"])
  ]
  keys = [key for key in results.KEYS if len({str(r.get(key)) for r in alternatives}) > 1]
  return " ".join([record["metric"], *(str(record.get(key)) for key in keys)])


def _shown(sweep: Sweep, record: results.Record) -> str:
  by = dataclasses.replace(sweep.by, metric=record["metric"])
  interval = record["interval"]
  return by.show(record["value"]) + ("" if interval is None else f" ± {by.show(interval)}")
