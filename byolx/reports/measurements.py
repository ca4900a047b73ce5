"""What workdirs measured: their records, with the config and the cost of the run behind each."""

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
  """One record, and where it comes from.

  Args:
    record: of results.json; keys that its version did not write are missing.
    workdirs: of the runs that were trained for it, where they can still be found.
    config: their flat config, without the seed's meaning; empty if unknown.
    seconds: that one of them trained, on average; None if unknown.
  """

  record: Mapping[str, Any]
  workdirs: tuple[Path, ...]
  config: Mapping[str, Any]
  seconds: float | None

  @property
  def data(self) -> str | None:
    """Name of the data set: the record's, or the config's source where an older record has none."""
    return self.record.get("data") or self.config.get("data.source")

  @property
  def chosen(self) -> bool:
    """Whether it is a result, and not one of several that validation images decide between."""
    return self.record.get("chosen", True) is not False


def read(paths: Iterable[Path], every: bool = False) -> list[Measurement]:
  """Records of workdirs of runs and sweeps, and of folders of them; each workdir once.

  Args:
    paths: workdirs, or folders with workdirs anywhere below. Of a sweep, its own results.
    every: of a sweep, every cell's and every final run's too.

  Raises:
    ConfigError: not a workdir and none below, or none of them has results yet.
  """
  found: dict[Path, list[Measurement]] = {}
  for path in paths:
    folders = _workdirs(path, every)
    finished = [folder for folder in folders if (folder / RESULTS).is_file()]
    missing = [folder for folder in folders if folder not in finished]
    if not finished:
      raise ConfigError(_no_results(missing))
    for folder in missing:
      _log.warning("%s", _no_results([folder]))
    for folder in finished:
      of = _of_sweep if (folder / SWEEP).is_file() else _of_run
      found.setdefault(folder.resolve(), of(folder))
    if not any(found[folder.resolve()] for folder in finished):
      raise ConfigError(
        f"{path}: no record in {RESULTS}; expected labelled test images, without which nothing is "
        "measured"
      )
  return [one for of_folder in found.values() for one in of_folder]


def training_seconds(workdir: Path, batch_size: int) -> float | None:
  """Time spent training, from metrics.jsonl: of each row, its images over its images a second.

  Waiting, compiling before the first step, evaluation and restarts are not in it. None if unknown.

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


def _workdirs(path: Path, every: bool) -> list[Path]:
  """The folder itself if it is a workdir or holds nothing but results, or the workdirs below it."""
  if not path.is_dir():
    what = "which is not a folder" if path.exists() else "which does not exist"
    raise ConfigError(
      f"{path}, {what}: expected a workdir of a run or a sweep, or a folder of them"
    )
  if (path / CONFIG).is_file() and not (path / SWEEP).is_file():
    return [path]
  found = _below(path, every)
  if not found and (path / RESULTS).is_file():
    return [path]
  if not found:
    raise ConfigError(
      f"{path}: no workdir, and none below; expected a folder with a {CONFIG} or a {SWEEP}, as "
      "`byolx train` and `byolx sweep` write them"
    )
  return found


def _below(path: Path, every: bool) -> list[Path]:
  """Every workdir at or below a folder, in the order of their names; nothing inside a run's."""
  found = []
  for name, folders, files in os.walk(path):
    folders.sort()
    sweep, run = SWEEP in files, CONFIG in files
    if sweep or run:
      found.append(Path(name))
    if not (sweep and every) and (sweep or run):
      folders.clear()
  return found


def _no_results(folders: Sequence[Path]) -> str:
  first = folders[0]
  if (first / SWEEP).is_file():
    how = "the `byolx sweep` that made it writes them when it ends; --all reports its finished runs"
  else:
    how = f"`byolx eval --from={first}` makes them, or the `byolx train` that made it when it ends"
  more = f" (nor in {len(folders) - 1} more)" if len(folders) > 1 else ""
  return f"{first}: no results yet{more}; {how}"


def _of_run(folder: Path) -> list[Measurement]:
  """Records of one run; or of a folder with nothing but results, of which means replace the rest."""
  records = _read_records(folder)
  if not (folder / CONFIG).is_file():
    means = [record for record in records if isinstance(record.get("seed"), list)]
    return [Measurement(record, (), {}, None) for record in means or records]
  config = _read_config(folder)
  seconds = _seconds([folder])
  return [Measurement(record, (folder,), config, seconds) for record in records]


def _of_sweep(folder: Path) -> list[Measurement]:
  """Records of a sweep: each names the workdir, or the folder of workdirs, that it comes from."""
  found = []
  for record in _read_records(folder):
    named = record.get("workdir") or []
    runs: list[Path] = []
    for name in [named] if isinstance(named, str) else named:
      places = (folder / name, Path(name))
      runs += next((_below(place, every=False) for place in places if place.is_dir()), [])
    config = _read_config(runs[0]) if runs else {}
    found.append(Measurement(record, tuple(runs), config, _seconds(runs)))
  return found


def _seconds(runs: Sequence[Path]) -> float | None:
  """Average over runs; None if it is unknown of any."""
  every = []
  for run in runs:
    batch = _read_config(run).get("train.batch_size")
    every.append(training_seconds(run, batch) if batch else None)
  known = [seconds for seconds in every if seconds is not None]
  return sum(known) / len(known) if known and len(known) == len(every) else None


def _read_records(folder: Path) -> list[dict[str, Any]]:
  records = _read_json(folder / RESULTS, list, "a list of records")
  needed = ("task", "protocol", "split", "metric", "value")
  for record in records:
    if not isinstance(record, dict) or any(key not in record for key in needed):
      raise ConfigError(
        f"{folder / RESULTS}: {str(record)[:60]!r}; expected records with {', '.join(needed)}"
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
