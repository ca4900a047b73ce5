"""What a sweep writes: `sweep.json` as it goes, its results, and their table.

`sweep.json` says what the sweep is, so that another one in its workdir is refused; see `changes`.
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

PAGE = "sweep.json"


class Page:
  """`sweep.json`, written whole whenever there is news.

  Args:
    sweep: whose workdir it is in; an earlier page there must be of the same.
  """

  def __init__(self, sweep: Sweep):
    self._path = sweep.workdir / PAGE
    earlier = _read(self._path)
    self._content = {**_identity(sweep), "chosen": earlier.get("chosen", {}), "finished": False}
    self._write()

  def choose(self, choices: Mapping[str, Choice]) -> dict[str, str]:
    """Notes what was chosen; returns for each group that had another choice before what that was."""
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
    """Notes that all is tested."""
    self._content["finished"] = True
    self._write()

  def _write(self) -> None:
    files.write_atomically(self._path, json.dumps(self._content, indent=1) + "\n")


@contextlib.contextmanager
def claimed(sweep: Sweep) -> Iterator[Page]:
  """Makes the workdir this sweep's, for this process alone.

  Raises:
    ConfigError: it holds another sweep or something else, or another process works there.
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
    yield Page(sweep)
  finally:
    os.close(folder)


def check(sweep: Sweep) -> None:
  """Refuses a workdir of another sweep or of something else."""
  if (sweep.workdir / "config.json").exists():
    raise ConfigError(
      f"--workdir={sweep.workdir} is the workdir of a run; expected one of a sweep, or a new one"
    )
  earlier = _read(sweep.workdir / PAGE)
  if earlier and (changed := changes(earlier, sweep)):
    raise ConfigError(
      f"--workdir={sweep.workdir} holds another sweep ({'; '.join(changed)}); choose another "
      "--workdir, or undo the change"
    )


def changes(earlier: Mapping[str, Any], sweep: Sweep) -> list[str]:
  """What keeps a sweep from going on as this one, in words.

  The config has to be the same, and cells that have results stay. From when a cell was chosen, and
  with it perhaps tested, how that is done stays as well. There may always be more cells and seeds.
  """
  base = config.flatten(config.from_json(json.dumps(earlier["fields"])))
  found = config.differences(base, config.flatten(sweep.base))
  labels = {cell.label for cell in sweep.cells}
  found += [
    f"--grid: without {label}, which has results"
    for label in earlier["cells"]
    if label not in labels and (sweep.workdir / "cells" / label / "results.json").exists()
  ]
  if earlier["chosen"]:
    new = _identity(sweep)
    found += [
      f"--{name}: {earlier[name]} -> {new[name]}"
      for name in ("per", "select", "retrain")
      if earlier[name] != new[name]
    ]
    if left_out := [seed for seed in earlier["seeds"] if seed not in sweep.seeds]:
      found.append(f"--seeds: without {', '.join(map(str, left_out))}")
  return found


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
  """The test records of every group, averaged over seeds."""
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
  """For each group what was chosen, and what it reached on validation and test images."""
  columns = list(dict.fromkeys(_column(record, records) for record in records))
  rows = [["group", "chosen", f"validation {sweep.by.metric}", *(f"test {c}" for c in columns)]]
  for group, choice in choices.items():
    own = {_column(r, records): r for r in records if r["group"] == group}
    shown = [_shown(sweep, own[column]) if column in own else "-" for column in columns]
    rows.append([group, choice.cell.label, sweep.by.show(choice.record["value"]), *shown])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  if len(sweep.seeds) > 1:
    lines.append(f"mean of seeds {', '.join(map(str, sweep.seeds))} ± half their range")
  return "\n".join(lines)


def _column(record: results.Record, records: Sequence[results.Record]) -> str:
  """Metric, and where a group has several of it what tells them apart."""
  same = [r for r in records if (r["group"], r["metric"]) == (record["group"], record["metric"])]
  keys = [key for key in results.KEYS if len({str(r.get(key)) for r in same}) > 1]
  return " ".join([record["metric"], *(str(record.get(key)) for key in keys)])


def _shown(sweep: Sweep, record: results.Record) -> str:
  by = dataclasses.replace(sweep.by, metric=record["metric"])
  interval = record["interval"]
  return by.show(record["value"]) + ("" if interval is None else f" ± {by.show(interval)}")
