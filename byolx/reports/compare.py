"""Averages measured results over seeds, and finds the paper's numbers for the same settings."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from byolx.core import text
from byolx.reports.measurements import Measurement
from byolx.reports.paper import LEFT_OPEN, TABLES, Cell, Column, Condition, OneOf, Row, Table
from byolx.runs import schema

_PROTOCOLS = ("linear", "knn", "online_probe")
_TASKS = ("linear", "finetune", "supervised", "pretrain")
_NAMES = {
  ("pretrain", "linear"): "linear probe",
  ("pretrain", "knn"): "k-NN",
  ("pretrain", "online_probe"): "online probe",
  ("finetune", "finetune"): "fine-tuning",
}
"""Names of protocols in the report, by the task and the protocol of a record (an entry of results.json).

A protocol that is not listed here keeps the name that it has in the record.
"""
_METRICS = {"top1": "top-1", "top5": "top-5"}
# Fields that may differ between the runs of one mean. `init.workdir` is only a path: the fields of the
# pretraining run in that workdir are in the record, under `pretrain`.
_NOT_COMPARED = ("seed", "init.workdir")
_RECORD_KEYS = (
  *("task", "protocol", "encoder", "labels", "split", "metric", "step"),
  *("pretrained_on", "pretrain_step"),
)


@dataclasses.dataclass(frozen=True)
class Result:
  """One measurement, or the mean of several measurements that differ only in their seeds.

  A measurement is one record of a results.json (a metric of a run on a data set), with the config of the
  run. In the arguments, "the measurements" are those in the mean.

  Args:
    record: record of the first measurement.
    data: name of the data set; None if unknown.
    config: config of the first measurement's run, as a flat mapping from field names to values; empty if
      the config is unknown.
    value: mean of the metric over the measurements, in 0..1.
    interval: half the difference between the largest and the smallest value (appendix G). For a single
      measurement, the interval in the record, or None if the record has no interval.
    n: number of values in the mean.
    seeds: distinct seeds of the measured runs.
    configs: distinct fingerprints (short hashes) of the runs' configs.
    commits: distinct commits of the code that made the measurements.
    workdirs: workdirs (output folders) of the training runs.
    seconds: mean training time per measurement, in seconds; None if it is unknown for a measurement.
  """

  record: Mapping[str, Any]
  data: str | None
  config: Mapping[str, Any]
  value: float
  interval: float | None
  n: int
  seeds: tuple[int, ...]
  configs: tuple[str, ...]
  commits: tuple[str, ...]
  workdirs: tuple[Path, ...]
  seconds: float | None


@dataclasses.dataclass(frozen=True)
class Departure:
  """A config field whose value in a run differs from the paper's protocol (its required settings).

  Args:
    field: name of the field.
    value: value in the run.
    paper: value in the paper's protocol, or a `OneOf` with several allowed values.
    pretrain: whether the field belongs to the run that pretrained the encoder, not to the measured run.
  """

  field: str
  value: Any
  paper: Any
  pretrain: bool = False

  def __str__(self) -> str:
    choices = self.paper.values if isinstance(self.paper, OneOf) else None
    paper = f"one of {', '.join(map(_show, choices))}" if choices else _show(self.paper)
    return f"{'pretraining ' * self.pretrain}{self.field}: {_show(self.value)} (paper: {paper})"


def results(measurements: Iterable[Measurement], include_all: bool = False) -> list[Result]:
  """Averages the measurements that differ only in their seeds.

  Args:
    measurements: records of results.json files with their configs, from any workdirs.
    include_all: whether to include results on validation images, and results of candidates (such as
      other learning rates) that were not chosen on validation images.

  Returns:
    One result per group of measurements that differ only in seeds, sorted by data set, task, protocol,
    split, metric, encoder and share of labels.
  """
  groups: dict[str, list[Measurement]] = {}
  for measurement in measurements:
    if include_all or (measurement.chosen and measurement.record["split"] == "test"):
      groups.setdefault(_identity(measurement), []).append(measurement)
  means = [_mean(part) for group in groups.values() for part in _repeats(group)]
  encoders = list(dict.fromkeys(_encoder(result) for result in means))
  places = {name: i for i, name in enumerate(encoders)}
  return sorted(
    means, key=lambda result: (*_order(result), places[_encoder(result)], labels(result))
  )


def matches(condition: Condition, record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
  """Returns whether a measured run has all settings that a cell of the paper's tables requires.

  Args:
    condition: required values of the run's record and configs, for the cell.
    record: record of the run, an entry of results.json.
    config: config of the run, as a flat mapping from field names to values. A missing field counts as
      its default. An empty mapping means that the config is unknown. Then the result is False if the
      cell requires the value of any field in this config.
  """
  return departures(condition, record, config) == []


def departures(
  condition: Condition, record: Mapping[str, Any], config: Mapping[str, Any]
) -> list[Departure] | None:
  """Returns the config fields whose values in a measured run are not those that a table cell requires.

  Args:
    condition: required values of the run's record and configs, for a cell of one of the paper's tables.
    record: record of the run, an entry of results.json.
    config: config of the run, as a flat mapping from field names to values; empty if it is unknown.

  Returns:
    The fields that differ. The list is empty if the run has all required values. The result is None if
    the run cannot be compared with the cell. This has one of five reasons: its record has another task,
    data set, metric or other required value; another candidate was chosen on validation images; its
    config is required but unknown; its encoder's pretraining is unfinished; the settings of this
    pretraining are required but unknown.
  """
  if record.get("chosen", True) is False or (condition.config and not config):
    return None
  if record.get("pretrain_finished") is False:  # the paper has no results of unfinished pretraining
    return None
  for key, expected in condition.record.items():
    if key == "pretrained_on" and key not in record and not condition.origin_known:
      continue
    actual = record.get(key)
    if key == "data" and actual is None:
      actual = config.get("data.source")
    if not _equal(actual, expected):
      return None
  pretrain = record.get("pretrain")
  if pretrain is None and condition.pretrain and condition.origin_known:
    return None
  pretrain_departures = [] if pretrain is None else _departures(condition.pretrain, pretrain, True)
  return _departures(condition.config, config, False) + pretrain_departures


def of_cell(table: Table, row: Row, column: Column, candidates: Sequence[Result]) -> list[Result]:
  """Returns the results among `candidates` that have all settings required by one cell of a table.

  The list is empty if this library cannot measure the cell.
  """
  condition = table.condition(row, column)
  if condition is None:
    return []
  return [result for result in candidates if matches(condition, result.record, result.config)]


def in_paper(result: Result) -> list[tuple[Table, Column, Cell]]:
  """Returns the cells of the paper's tables whose required settings a result has.

  Usually the list has at most one cell.
  """
  return [
    (table, column, cell)
    for table, column, cell, condition in _measurable_cells()
    if matches(condition, result.record, result.config)
  ]


@functools.cache
def _measurable_cells() -> tuple[tuple[Table, Column, Cell, Condition], ...]:
  """Returns all cells of the paper's tables that this library can measure.

  The condition of each cell, the last value of its tuple, has the settings that a run must have.
  """
  return tuple(
    (table, column, cell, condition)
    for table in TABLES.values()
    for row in table.rows
    for column, cell in zip(table.columns, row.cells, strict=True)
    if cell.value is not None and (condition := table.condition(row, column)) is not None
  )


def off_protocol(
  table: Table, row: Row, column: Column, candidates: Sequence[Result]
) -> list[tuple[Result, list[Departure]]]:
  """Returns the results that differ from one cell of a paper table only in protocol fields.

  A cell requires values of config fields. The protocol fields of a table are those that do not
  distinguish its rows, such as the number of epochs. In all other fields (`Table.defining`), such as the
  network, a returned result has the required values. A result without any difference is not returned.

  Returns:
    Pairs of a result and the protocol fields in which it differs from the cell.
  """
  condition = table.condition(row, column)
  if condition is None:
    return []
  pairs = [(result, _off_protocol(table, condition, result)) for result in candidates]
  return [(result, fields) for result, fields in pairs if fields]


def _off_protocol(table: Table, condition: Condition, result: Result) -> list[Departure]:
  """Returns the fields in which a result differs from one table cell, if all are protocol fields.

  The protocol of a table is the fields that do not distinguish its rows. The list is empty in three
  cases. The result differs in a field that distinguishes the rows. Or it has all settings of the cell.
  Or it cannot be compared with the cell.
  """
  config, pretrain = table.defining
  fields = departures(condition, result.record, result.config) or []
  of_other_row = any(
    departure.field in (pretrain if departure.pretrain else config) for departure in fields
  )
  return [] if of_other_row else fields


def nearest(result: Result) -> tuple[list[tuple[Table, Column, Cell]], list[Departure]]:
  """Finds the cells of the paper's tables that differ least from a result in the protocol.

  Returns:
    A list of cells, and a list of the fields in which the result differs from each of these cells. The
    cells are those with the fewest differing fields. If some of them differ in other fields than the
    first cell does, they are left out. Both lists are empty if a cell has exactly the settings of the
    result, or if no cell is similar.
  """
  places: list[tuple[Table, Column, Cell]] = []
  fewest: list[Departure] = []
  if in_paper(result):
    return places, fewest
  for table, column, cell, condition in _measurable_cells():
    if fields := _off_protocol(table, condition, result):
      if not places or len(fields) < len(fewest):
        places, fewest = [], fields
      if fields == fewest:
        places.append((table, column, cell))
  return places, fewest


def open_choices(result: Result) -> list[str]:
  """Lists the fields that the paper does not state, if a run's values differ from the shipped configs.

  Each field is a text `field=value`. A field of the encoder's pretraining run has the prefix
  "pretraining ".
  """
  pretrain = result.record.get("pretrain")
  fields = (
    _departures(LEFT_OPEN.get(result.record["task"], {}), result.config, False)
    if result.config
    else []
  )
  if pretrain is not None:
    fields += _departures(LEFT_OPEN["pretrain"], pretrain, True)
  return [
    f"{'pretraining ' * departure.pretrain}{departure.field}={_show(departure.value)}"
    for departure in fields
    if departure.value is not None
  ]


def protocol(result: Result) -> str:
  """Returns the name of the protocol by which a result was measured, and of its variations.

  Example: `linear, pretrain views, tclip 20` is a linear evaluation with two variations: training images
  are augmented as in pretraining, and logits are clipped by tclip with alpha = 20.
  """
  task, name = result.record["task"], result.record["protocol"]
  words = [_NAMES.get((task, name), name)]
  if "chosen" in result.record:  # a trained classifier, not a probe
    views = result.config.get("classify.views")
    words += [f"{views} views"] if views and views != "spatial" else []
    for field, word in (("tclip", "tclip"), ("logit_penalty", "logit penalty")):
      value = result.config.get(f"classify.{field}")
      words += [f"{word} {value:g}"] if value else []
  if result.record["split"] != "test":
    words.append(result.record["split"])
  if result.record.get("chosen") is False:
    words.append("not chosen")
  if "chosen" in result.record and result.record["split"] != "test" and result.record.get("rate"):
    words.append(f"rate {result.record['rate']:g}")
  return ", ".join(words)


def encoder(result: Result) -> str:
  """Returns the names of a result's encoder and network, separated by commas.

  The name of the pretraining data set is added (`from imagenet`) if it is not the measured data set.
  """
  words = [str(result.record.get("encoder") or ""), network(result.config)]
  origin = result.record.get("pretrained_on")
  words += [f"from {origin}"] if origin and origin != result.data else []
  return ", ".join(filter(None, words))


def network(config: Mapping[str, Any]) -> str:
  """Returns the name of the network in a flat config, such as `ResNet-50 1×` or `custom 64-128`.

  The name is empty if the config has no `model.arch`.
  """
  arch = config.get("model.arch", "")
  if arch == "custom":
    return f"custom {'-'.join(map(str, config.get('model.channels', ())))}"
  depth = arch.removeprefix("resnet")
  return f"ResNet-{depth} {config.get('model.width', 1.0):g}×" if depth != arch else arch


def share(result: Result) -> str:
  """Returns the share of the training labels that a result used, as text such as `1 %`; "" if unknown."""
  labels = result.record.get("labels")
  return "" if labels is None else f"{100 * labels:g} %"


def metric(result: Result) -> str:
  """Returns the printed name of a result's metric, such as `top-1` for "top1"."""
  return _METRICS.get(result.record["metric"], result.record["metric"])


def cost(result: Result) -> str:
  """Returns a result's number of runs, mean training time and devices as text.

  Example: `3 × 12 min 20 s on 2 x cpu`. The text is `-` if the training time is unknown.
  """
  devices = result.record.get("devices")
  if result.seconds is None:
    return "-"
  runs = f"{len(result.workdirs)} × " if len(result.workdirs) > 1 else ""
  return f"{runs}{text.duration(result.seconds)}" + (f" on {devices}" if devices else "")


def _departures(
  expected: Mapping[str, Any], flat: Mapping[str, Any], pretrain: bool
) -> list[Departure]:
  """Returns the fields of a flat config whose value is not the expected one.

  Args:
    expected: expected values by field name. A value may be a `OneOf` with several allowed values.
    flat: config as a flat mapping from field names to values. A missing field counts as its default.
    pretrain: whether the config is that of the encoder's pretraining run.
  """
  different, fields = [], schema.fields()
  for name, value in expected.items():
    actual = flat[name] if name in flat else fields[name].default if name in fields else None
    choices = value.values if isinstance(value, OneOf) else (value,)
    if not any(_equal(actual, choice) for choice in choices):
      different.append(Departure(name, actual, value, pretrain))
  return different


def _show(value: Any) -> str:
  """Returns the text of a field's value. Floats have no trailing zeros, and an empty text has quotes."""
  if isinstance(value, list | tuple):
    return f"({', '.join(map(_show, value))})"
  if isinstance(value, float):
    return f"{value:.10g}"
  return repr(value) if value == "" else str(value)


def _equal(actual: Any, expected: Any) -> bool:
  """Returns whether a value of a config or a record equals the expected value.

  A list equals a tuple with equal elements. Numbers are equal within a relative error of 1e-9, and 1
  equals 1.0. A boolean equals only a boolean: 1 does not equal True.
  """
  if isinstance(actual, list | tuple) and isinstance(expected, list | tuple):
    return len(actual) == len(expected) and all(map(_equal, actual, expected))
  if (
    isinstance(actual, bool) or isinstance(expected, bool) or not isinstance(expected, int | float)
  ):
    return type(actual) is type(expected) and actual == expected
  return isinstance(actual, int | float) and abs(actual - expected) <= 1e-9 * abs(expected)


def _identity(measurement: Measurement) -> str:
  """Returns a key that is equal for measurements of the same setting, which may be averaged.

  Such measurements may differ in seeds, commits, workdirs and config fields that cannot change a result.
  Their learning rates may also differ, if the rate was chosen on validation images.
  """
  fields = schema.fields()
  config: Any = {
    name: value
    for name, value in measurement.config.items()
    if name not in _NOT_COMPARED and (name not in fields or not fields[name].free)
  }
  record = measurement.record
  pretrain = record.get("pretrain")
  facts = {
    **{key: record.get(key) for key in _RECORD_KEYS},
    "data": measurement.data,
    "config": config or record.get("config"),
    "pretrain": pretrain and {k: v for k, v in pretrain.items() if k not in _NOT_COMPARED},
    # If validation chose the rate, each seed may have another one.
    "rate": None if record.get("chosen") else record.get("rate"),
    # A record that is already a mean is not averaged with others.
    "mean of": record["seed"] if isinstance(record.get("seed"), list) else None,
  }
  return json.dumps(facts, sort_keys=True, default=list)


def _repeats(group: Sequence[Measurement]) -> list[list[Measurement]]:
  """Removes duplicates from a group of measurements, and divides the others by commit if seeds repeat.

  Measurements with the same seeds, commit and value are duplicates: only the first is kept. If several
  of the others still have the same seeds, they are divided into one list per commit.
  """
  distinct: dict[tuple, Measurement] = {}
  for measurement in group:
    key = (_seeds(measurement), _commit(measurement), measurement.record["value"])
    distinct.setdefault(key, measurement)
  measurements = list(distinct.values())
  if len({_seeds(measurement) for measurement in measurements}) == len(measurements):
    return [measurements]
  by_commit: dict[Any, list[Measurement]] = {}
  for measurement in measurements:
    by_commit.setdefault(_commit(measurement), []).append(measurement)
  return list(by_commit.values())


def _commit(measurement: Measurement) -> str:
  """Returns, as JSON, the git commit of the code that made a measurement.

  It is a list of commits if the measurement is a mean of values from several commits, and null if the
  commit is unknown.
  """
  return json.dumps(measurement.record.get("commit"))


def _seeds(measurement: Measurement) -> str:
  """Returns the seeds of a measured run and of the run that pretrained its encoder, as JSON."""
  pretrain = measurement.record.get("pretrain") or {}
  return json.dumps([measurement.record.get("seed"), pretrain.get("seed", 0)])


def _mean(group: Sequence[Measurement]) -> Result:
  first = group[0]
  values = [measurement.record["value"] for measurement in group]
  seconds = [measurement.seconds for measurement in group if measurement.seconds is not None]
  seeds: list[int] = []
  for measurement in group:
    seed = measurement.record.get("seed")
    seeds += seed if isinstance(seed, list) else [] if seed is None else [seed]
  return Result(
    first.record,
    first.data,
    first.config,
    sum(values) / len(values),
    (max(values) - min(values)) / 2 if len(values) > 1 else first.record.get("interval"),
    sum(measurement.record.get("n") or 1 for measurement in group),
    tuple(dict.fromkeys(seeds)),
    _distinct(measurement.record.get("config") for measurement in group),
    _distinct(measurement.record.get("commit") for measurement in group),
    tuple(dict.fromkeys(workdir for measurement in group for workdir in measurement.workdirs)),
    sum(seconds) / len(seconds) if len(seconds) == len(group) else None,
  )


def _distinct(values: Iterable[str | list[str] | None]) -> tuple[str, ...]:
  """Returns the distinct non-empty names in the order of their first use.

  Each value is a name, a list of names, or None.
  """
  names = [name for value in values for name in (value if isinstance(value, list) else [value])]
  return tuple(dict.fromkeys(name for name in names if name))


def _order(result: Result) -> tuple:
  record = result.record
  task, name = record["task"], record["protocol"]
  places = (_place(_TASKS, task), _place(_PROTOCOLS, name))
  return (str(result.data), *places, str(task), str(name), record["split"], record["metric"])


def _place(order: Sequence[str], name: str) -> int:
  """Returns the index of a name in a sequence, or the length of the sequence if the name is not in it."""
  return order.index(name) if name in order else len(order)


def _encoder(result: Result) -> str:
  return str(result.record.get("encoder"))


def labels(result: Result) -> float:
  """Returns the share of the training labels that a result used, in 0..1; 0 if unknown."""
  return float(result.record.get("labels") or 0)
