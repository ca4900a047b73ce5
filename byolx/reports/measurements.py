"""Reads the records (results.json) of workdirs, each with the config and the training time of its run."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from byolx.core.config import ConfigError
from byolx.runs import metrics_log

_log = logging.getLogger("byolx")

CONFIG, RESULTS, SWEEP = "config.json", "results.json", "sweep.json"


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One record of a results.json, with the training runs that it comes from.

  Args:
    record: the record, such as {"task": "linear", "metric": "top1", "value": 0.74, ...}. Records of older
      versions may lack keys.
    workdirs: existing workdirs (output folders) of the training runs; several if the record is a mean
      over seeds.
    config: config of the first run, as a flat mapping from field names to values; empty if unknown.
    seconds: mean training time of the runs, in seconds; None if unknown.
  """

  record: Mapping[str, Any]
  workdirs: tuple[Path, ...]
  config: Mapping[str, Any]
  seconds: float | None

  @property
  def data(self) -> str | None:
    """Name of the data set, from the record or else from the config; None if it is unknown."""
    return self.record.get("data") or self.config.get("data.source")

  @property
  def chosen(self) -> bool:
    """Whether the record belongs to the chosen candidate, such as the best of several learning rates.

    It is False only if another candidate was chosen on validation images.
    """
    return self.record.get("chosen", True) is not False


def read(paths: Iterable[Path], include_all: bool = False) -> list[Measurement]:
  """Reads the records (entries of results.json) of runs and sweeps.

  A workdir (output folder) that several paths contain is counted once.

  Args:
    paths: workdirs of runs or sweeps, or folders with workdirs at any depth.
    include_all: whether to read also each run inside a sweep's workdir, not only the results.json of the
      sweep itself.

  Returns:
    One measurement per record.

  Raises:
    ConfigError: a path is not a folder or has no workdir, none of its workdirs has results or records,
      or a file is damaged.
  """
  by_folder: dict[Path, list[Measurement]] = {}
  for path in paths:
    folders = _workdirs(path, include_all)
    finished = [folder for folder in folders if (folder / RESULTS).is_file()]
    missing = [folder for folder in folders if folder not in finished]
    if not finished:
      raise ConfigError(_no_results(missing))
    for folder in missing:
      _log.warning("%s", _no_results([folder]))
    for folder in finished:
      measure = _of_sweep if (folder / SWEEP).is_file() else _of_run
      by_folder.setdefault(folder.resolve(), measure(folder))
    if not any(by_folder[folder.resolve()] for folder in finished):
      raise ConfigError(
        f"{path}: no record in {RESULTS}; expected records, which need labelled test images"
      )
  return [measurement for measurements in by_folder.values() for measurement in measurements]


def training_seconds(workdir: Path, batch_size: int) -> float | None:
  """Computes the training time of a run from its metrics.jsonl.

  For each row, the number of images since the previous row is divided by the row's images per second.
  The training time is the sum over the rows. It excludes waiting, compilation before the first step,
  evaluation and restarts.

  Args:
    workdir: workdir (output folder) of the run.
    batch_size: number of images per training step.

  Returns:
    Training time in seconds; None if no row has a speed.

  Raises:
    ConfigError: metrics.jsonl is damaged.
  """
  try:
    rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
  except ValueError as error:
    raise ConfigError(str(error)) from None
  seconds, before = 0.0, 0
  for row in rows:
    if rate := row.get("images_per_second"):
      seconds += max(0, row["step"] - before) * batch_size / rate
    before = row["step"]
  return seconds or None


def _workdirs(path: Path, include_sweep_runs: bool) -> list[Path]:
  """Returns the workdirs of runs and sweeps at or below a path.

  A run's workdir has a config.json, and a sweep's has a sweep.json. If no workdir is found, but the path
  has a results.json, the path itself is returned.

  Raises:
    ConfigError: the path is not a folder, or there is no workdir.
  """
  if not path.is_dir():
    problem = "which is not a folder" if path.exists() else "which does not exist"
    raise ConfigError(
      f"{path}, {problem}: expected a workdir of a run or a sweep, or a folder of them"
    )
  if (path / CONFIG).is_file() and not (path / SWEEP).is_file():
    return [path]
  workdirs = _below(path, include_sweep_runs)
  if not workdirs and (path / RESULTS).is_file():
    return [path]
  if not workdirs:
    raise ConfigError(
      f"{path}: no workdir, and none below; expected a folder with a {CONFIG} or a {SWEEP}, as "
      "`byolx train` and `byolx sweep` write them"
    )
  return workdirs


def _below(path: Path, include_sweep_runs: bool) -> list[Path]:
  """Returns the workdirs of runs and sweeps at or below a folder, with sub-folders in order of name.

  Folders inside a run's workdir are skipped. Those inside a sweep's workdir are searched only if
  `include_sweep_runs` is True.
  """
  workdirs = []
  for name, folders, files in os.walk(path):
    folders.sort()
    sweep, run = SWEEP in files, CONFIG in files
    if sweep or run:
      workdirs.append(Path(name))
    if not (sweep and include_sweep_runs) and (sweep or run):
      folders.clear()
  return workdirs


def _no_results(folders: Sequence[Path]) -> str:
  first = folders[0]
  if (first / SWEEP).is_file():
    advice = "let its `byolx sweep` finish, or report its finished runs with --all"
  else:
    advice = f"run `byolx eval --from={first}`, or let its `byolx train` finish"
  more = f" (nor in {len(folders) - 1} more)" if len(folders) > 1 else ""
  return f"{first}: no results yet{more}; {advice}"


def _of_run(folder: Path) -> list[Measurement]:
  """Reads the records of one run.

  If the folder has a results.json but no config.json, only the records that are means over seeds are
  returned, or all records if none is a mean.
  """
  records = _read_records(folder)
  if not (folder / CONFIG).is_file():
    means = [record for record in records if isinstance(record.get("seed"), list)]
    return [Measurement(record, (), {}, None) for record in means or records]
  config = _read_config(folder)
  seconds = _seconds([folder])
  return [Measurement(record, (folder,), config, seconds) for record in records]


def _of_sweep(folder: Path) -> list[Measurement]:
  """Reads the records of a sweep. Each record names its runs' workdirs, or a folder that has them."""
  measurements = []
  for record in _read_records(folder):
    names = record.get("workdir") or []
    runs: list[Path] = []
    for name in [names] if isinstance(names, str) else names:
      places = (folder / name, Path(name))
      runs += next(
        (_below(place, include_sweep_runs=False) for place in places if place.is_dir()), []
      )
    config = _read_config(runs[0]) if runs else {}
    measurements.append(Measurement(record, tuple(runs), config, _seconds(runs)))
  return measurements


def _seconds(runs: Sequence[Path]) -> float | None:
  """Returns the mean training time of runs, in seconds; None if the time of any run is unknown."""
  seconds = []
  for run in runs:
    batch = _read_config(run).get("train.batch_size")
    seconds.append(training_seconds(run, batch) if batch else None)
  measured = [value for value in seconds if value is not None]
  return sum(measured) / len(measured) if measured and len(measured) == len(seconds) else None


def _read_records(folder: Path) -> list[dict[str, Any]]:
  records = _read_json(folder / RESULTS, list, "a list of records")
  required = ("task", "protocol", "split", "metric", "value")
  for record in records:
    if not isinstance(record, dict) or any(key not in record for key in required):
      raise ConfigError(
        f"{folder / RESULTS}: {str(record)[:60]!r}; expected records with {', '.join(required)}"
      )
    if not isinstance(record["value"], int | float):
      raise ConfigError(f"{folder / RESULTS}: value {record['value']!r}; expected a number in 0..1")
  return records


def _read_config(folder: Path) -> dict[str, Any]:
  return _read_json(folder / CONFIG, dict, "the fields of a run")


def _read_json(path: Path, kind: type, expected: str) -> Any:
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f"{path}: not JSON ({error}); expected {expected}") from None
  if not isinstance(content, kind):
    raise ConfigError(f"{path}: {type(content).__name__}; expected {expected}")
  return content
