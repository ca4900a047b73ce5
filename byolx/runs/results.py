"""Reads the records (entries) of `results.json`, and averages them over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
"""One measurement: a dict with the keys task, protocol, encoder, labels, split, metric, value, ..."""

KEYS = ("task", "protocol", "encoder", "labels", "split", "metric", "step", "commit")
"""Keys whose values are equal in all records of one measurement that was repeated with other seeds."""


def read(workdir: Path) -> list[Record]:
  """Reads the records (entries) of a workdir's `results.json`; returns [] if the file does not exist."""
  path = workdir / "results.json"
  return json.loads(path.read_text()) if path.exists() else []


def mean_over_seeds(records: Sequence[Record], keys: Sequence[str] = KEYS) -> list[Record]:
  """Averages the records that have equal values of `keys`.

  Args:
    records: measurements of several seeds.
    keys: keys whose values are equal in the records of one measurement.

  Returns:
    One record per group of averaged records, in the order of first occurrence. `value` is the mean.
    `interval` is half the range over seeds, as in the paper; for a group of one record, it is the
    interval of this record. `n` is the sum of the records' `n`. `seed`, and any other key with different
    values, has a list with the value of each record.
  """
  groups: dict[tuple, list[Record]] = {}
  for record in records:
    groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
  return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Record]) -> Record:
  columns = {name: [record.get(name) for record in group] for name in group[0]}
  values = columns["value"]
  return {
    **{name: each if each != each[:1] * len(each) else each[0] for name, each in columns.items()},
    "value": float(np.mean(values)),
    "interval": float(np.ptp(values) / 2) if len(values) > 1 else group[0].get("interval"),
    "n": sum(columns["n"]),
    "seed": columns["seed"],
  }
