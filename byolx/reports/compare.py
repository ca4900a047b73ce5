"""Measured results beside the paper's: means over seeds, and which result is which number of a table."""

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
_PROBES = {"linear": "linear probe", "knn": "k-NN", "online_probe": "online probe"}
_TASK_NAMES = {"finetune": "fine-tuning"}
_METRICS = {"top1": "top-1", "top5": "top-5"}
_UNSHAPING = ("seed", "init.workdir")  # the second names a place; `pretrain` says what is there
_RECORD_KEYS = (
  *("task", "protocol", "encoder", "labels", "split", "metric", "step"),
  *("pretrained_on", "pretrain_step"),
)


@dataclasses.dataclass(frozen=True)
class Result:
  """One number: a measurement, or the mean of several that differ in nothing but seeds.

  Args:
    record: of the first of them.
    data: name of the data set, if known.
    config: flat, of the first of them; empty if unknown.
    value: in 0..1.
    interval: half the range over seeds (appendix G), or what the record has; None for one run.
    n: how many were averaged.
    seeds: of them.
    configs, commits: fingerprints of configs, and commits, each once.
    workdirs: that were trained for it.
    seconds: that one of them trained, on average; None if unknown.
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
  """A field in which a run is not what the paper's protocol says.

  Args:
    field: name of the field.
    value: value of the run.
    paper: value of the protocol, or a `OneOf`.
    pretrain: whether it is a field of the pretraining that the encoder comes from.
  """

  field: str
  value: Any
  paper: Any
  pretrain: bool = False

  def __str__(self) -> str:
    choices = self.paper.values if isinstance(self.paper, OneOf) else None
    paper = f"one of {', '.join(map(_show, choices))}" if choices else _show(self.paper)
    return f"{'pretraining ' * self.pretrain}{self.field}: {_show(self.value)} (paper: {paper})"


def results(measurements: Iterable[Measurement], every: bool = False) -> list[Result]:
  """Means over seeds, in the order of tasks, data sets, protocols and shares of labels.

  Args:
    measurements: of any workdirs.
    every: those on validation images, and those that were not chosen, as well.
  """
  groups: dict[str, list[Measurement]] = {}
  for one in measurements:
    if every or (one.chosen and one.record["split"] == "test"):
      groups.setdefault(_identity(one), []).append(one)
  made = [_mean(part) for group in groups.values() for part in _repeats(group)]
  places = {name: i for i, name in enumerate(dict.fromkeys(_encoder(one) for one in made))}
  return sorted(made, key=lambda one: (*_order(one), places[_encoder(one)], labels(one)))


def matches(condition: Condition, record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
  """Whether a record, of a run of this flat config, is what the condition says.

  Fields that the run did not write have their defaults; a run of unknown config matches nothing.
  """
  return departures(condition, record, config) == []


def departures(
  condition: Condition, record: Mapping[str, Any], config: Mapping[str, Any]
) -> list[Departure] | None:
  """The fields in which a record's run differs from a condition; None if it is another measurement.

  The keys of the record must be the condition's: task, data, metric, share of the labels, and what the
  encoder was pretrained on.
  """
  if record.get("chosen", True) is False or (condition.config and not config):
    return None
  if record.get("pretrain_finished") is False:  # the paper has no number of half a pretraining
    return None
  for key, wanted in condition.record.items():
    if key == "pretrained_on" and key not in record and not condition.origin_known:
      continue
    known = record.get(key)
    if key == "data" and known is None:
      known = config.get("data.source")
    if not _equal(known, wanted):
      return None
  pretrain = record.get("pretrain")
  if pretrain is None and condition.pretrain and condition.origin_known:
    return None
  of_encoder = [] if pretrain is None else _departures(condition.pretrain, pretrain, True)
  return _departures(condition.config, config, False) + of_encoder


def of_cell(table: Table, row: Row, column: Column, found: Sequence[Result]) -> list[Result]:
  """The results that are one number of a table."""
  condition = table.condition(row, column)
  if condition is None:
    return []
  return [one for one in found if matches(condition, one.record, one.config)]


def in_paper(result: Result) -> list[tuple[Table, Column, Cell]]:
  """Where the paper has this result; most often in no table, or in one."""
  return [
    (table, column, cell)
    for table, column, cell, condition in _measurable_cells()
    if matches(condition, result.record, result.config)
  ]


@functools.cache
def _measurable_cells() -> tuple[tuple[Table, Column, Cell, Condition], ...]:
  """Every number of the paper that a run can be."""
  return tuple(
    (table, column, cell, condition)
    for table in TABLES.values()
    for row in table.rows
    for column, cell in zip(table.columns, row.cells, strict=True)
    if cell.value is not None and (condition := table.condition(row, column)) is not None
  )


def off_protocol(
  table: Table, row: Row, column: Column, found: Sequence[Result]
) -> list[tuple[Result, list[Departure]]]:
  """The results that would be one number of a table, were it not for fields of its protocol.

  They have the row's network, and every field that tells the rows of this table apart.
  """
  condition = table.condition(row, column)
  if condition is None:
    return []
  strays = [(one, _off_protocol(table, condition, one)) for one in found]
  return [(one, fields) for one, fields in strays if fields]


def _off_protocol(table: Table, condition: Condition, one: Result) -> list[Departure]:
  """Fields of a table's protocol in which a result differs; empty if it is not of the row."""
  config, pretrain = table.defining
  fields = departures(condition, one.record, one.config) or []
  of_row = any(each.field in (pretrain if each.pretrain else config) for each in fields)
  return [] if of_row else fields


def nearest(result: Result) -> tuple[list[tuple[Table, Column, Cell]], list[Departure]]:
  """Where the paper has a result by another protocol, with the fewest fields that differ.

  Both lists are empty if the result is a number of the paper, or like none of them.
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


def open_choices(one: Result) -> list[str]:
  """Fields that the paper leaves open, of which a result's run has other values than the configs."""
  pretrain = one.record.get("pretrain")
  fields = (
    _departures(LEFT_OPEN.get(one.record["task"], {}), one.config, False) if one.config else []
  )
  if pretrain is not None:
    fields += _departures(LEFT_OPEN["pretrain"], pretrain, True)
  return [
    f"{'pretraining ' * each.pretrain}{each.field}={_show(each.value)}"
    for each in fields
    if each.value is not None
  ]


def protocol(one: Result) -> str:
  """What was done, and by which variation: `linear, pretrain views, tclip 20`."""
  task, name = one.record["task"], one.record["protocol"]
  words = [_PROBES.get(name, name) if task == "pretrain" else _TASK_NAMES.get(task, task)]
  if task != "pretrain":
    views = one.config.get("classify.views")
    words += [f"{views} views"] if views and views != "spatial" else []
    for field, word in (("tclip", "tclip"), ("logit_penalty", "logit penalty")):
      value = one.config.get(f"classify.{field}")
      words += [f"{word} {value:g}"] if value else []
  if one.record["split"] != "test":
    words.append(one.record["split"])
  if one.record.get("chosen") is False:
    words.append("not chosen")
  if "chosen" in one.record and one.record["split"] != "test" and one.record.get("rate"):
    words.append(f"rate {one.record['rate']:g}")
  return ", ".join(words)


def encoder(one: Result) -> str:
  """Which encoder of what network, and on what it was pretrained where that is another data set."""
  words = [str(one.record.get("encoder") or ""), network(one.config)]
  origin = one.record.get("pretrained_on")
  words += [f"from {origin}"] if origin and origin != one.data else []
  return ", ".join(filter(None, words))


def network(config: Mapping[str, Any]) -> str:
  """`ResNet-50 1×`; of a custom one its channels; empty if unknown."""
  arch = config.get("model.arch", "")
  if arch == "custom":
    return f"custom {'-'.join(map(str, config.get('model.channels', ())))}"
  depth = arch.removeprefix("resnet")
  return f"ResNet-{depth} {config.get('model.width', 1.0):g}×" if depth != arch else arch


def share(one: Result) -> str:
  """Of the labels: `1 %`."""
  labels = one.record.get("labels")
  return "" if labels is None else f"{100 * labels:g} %"


def metric(one: Result) -> str:
  """`top-1`."""
  return _METRICS.get(one.record["metric"], one.record["metric"])


def cost(one: Result) -> str:
  """`3 × 12 min 20 s on 2 x cpu`; `-` if unknown."""
  devices = one.record.get("devices")
  if one.seconds is None:
    return "-"
  runs = f"{len(one.workdirs)} × " if len(one.workdirs) > 1 else ""
  return f"{runs}{text.duration(one.seconds)}" + (f" on {devices}" if devices else "")


def _departures(
  wanted: Mapping[str, Any], flat: Mapping[str, Any], pretrain: bool
) -> list[Departure]:
  """Fields that do not have the wanted value; a field that is not there has its default."""
  found, fields = [], schema.fields()
  for name, value in wanted.items():
    known = flat[name] if name in flat else fields[name].default if name in fields else None
    choices = value.values if isinstance(value, OneOf) else (value,)
    if not any(_equal(known, choice) for choice in choices):
      found.append(Departure(name, known, value, pretrain))
  return found


def _show(value: Any) -> str:
  """A value of a field as `byolx fields` has it, numbers without trailing zeros."""
  if isinstance(value, list | tuple):
    return f"({', '.join(map(_show, value))})"
  if isinstance(value, float):
    return f"{value:.10g}"
  return repr(value) if value == "" else str(value)


def _equal(known: Any, wanted: Any) -> bool:
  """Lists are tuples, and whole numbers are numbers; but a number is not True."""
  if isinstance(known, list | tuple) and isinstance(wanted, list | tuple):
    return len(known) == len(wanted) and all(map(_equal, known, wanted))
  if isinstance(known, bool) or isinstance(wanted, bool) or not isinstance(wanted, int | float):
    return type(known) is type(wanted) and known == wanted
  return isinstance(known, int | float) and abs(known - wanted) <= 1e-9 * abs(wanted)


def _identity(one: Measurement) -> str:
  """Equal for measurements that may differ in seeds, commits, and places, and in nothing else."""
  fields = schema.fields()
  config: Any = {
    name: value
    for name, value in one.config.items()
    if name not in _UNSHAPING and (name not in fields or not fields[name].free)
  }
  pretrain = one.record.get("pretrain")
  facts = {
    **{key: one.record.get(key) for key in _RECORD_KEYS},
    "data": one.data,
    "config": config or one.record.get("config"),
    "pretrain": pretrain and {k: v for k, v in pretrain.items() if k not in _UNSHAPING},
    # Where validation images chose, each seed may have its own.
    "rate": None if one.record.get("chosen") else one.record.get("rate"),
    # A mean is not averaged again with others.
    "mean of": one.record["seed"] if isinstance(one.record.get("seed"), list) else None,
  }
  return json.dumps(facts, sort_keys=True, default=list)


def _repeats(group: Sequence[Measurement]) -> list[list[Measurement]]:
  """A group, cut by commits where these ran the same seeds; what is there twice counts once."""
  distinct: dict[tuple, Measurement] = {}
  for one in group:
    distinct.setdefault((_seeds(one), _commit(one), one.record["value"]), one)
  kept = list(distinct.values())
  if len({_seeds(one) for one in kept}) == len(kept):
    return [kept]
  by_commit: dict[Any, list[Measurement]] = {}
  for one in kept:
    by_commit.setdefault(_commit(one), []).append(one)
  return list(by_commit.values())


def _commit(one: Measurement) -> str:
  """That of its record; a mean over runs of several commits lists them."""
  return json.dumps(one.record.get("commit"))


def _seeds(one: Measurement) -> str:
  """Of the run and of its encoder's pretraining."""
  pretrain = one.record.get("pretrain") or {}
  return json.dumps([one.record.get("seed"), pretrain.get("seed", 0)])


def _mean(group: Sequence[Measurement]) -> Result:
  first = group[0]
  values = [one.record["value"] for one in group]
  known = [one.seconds for one in group if one.seconds is not None]
  seeds: list[int] = []
  for one in group:
    seed = one.record.get("seed")
    seeds += seed if isinstance(seed, list) else [] if seed is None else [seed]
  return Result(
    first.record,
    first.data,
    first.config,
    sum(values) / len(values),
    (max(values) - min(values)) / 2 if len(values) > 1 else first.record.get("interval"),
    sum(one.record.get("n") or 1 for one in group),
    tuple(dict.fromkeys(seeds)),
    _distinct(one.record.get("config") for one in group),
    _distinct(one.record.get("commit") for one in group),
    tuple(dict.fromkeys(workdir for one in group for workdir in one.workdirs)),
    sum(known) / len(known) if len(known) == len(group) else None,
  )


def _distinct(found: Iterable[str | list[str] | None]) -> tuple[str, ...]:
  """Each name once; a mean over runs that differ lists theirs."""
  names = [name for one in found for name in (one if isinstance(one, list) else [one])]
  return tuple(dict.fromkeys(name for name in names if name))


def _order(one: Result) -> tuple:
  task, name = one.record["task"], one.record["protocol"]
  places = (_place(_TASKS, task), _place(_PROTOCOLS, name))
  return (str(one.data), *places, str(task), str(name), one.record["split"], one.record["metric"])


def _place(order: Sequence[str], name: str) -> int:
  """Its index; names that are not there come last."""
  return order.index(name) if name in order else len(order)


def _encoder(one: Result) -> str:
  return str(one.record.get("encoder"))


def labels(one: Result) -> float:
  """The share of the labels that was used; 0 if unknown."""
  return float(one.record.get("labels") or 0)
