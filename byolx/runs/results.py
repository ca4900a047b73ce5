"""Records of `results.json`: reading, and means over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
"""One measurement: task, protocol, encoder, labels, split, metric, value, interval, n, seed, ..."""

KEYS = ("task", "protocol", "encoder", "labels", "split", "metric", "step", "commit")
"""Keys that are equal in the records of one measurement with different seeds."""


def read(workdir: Path) -> list[Record]:
  """Reads the records of a workdir; an empty list if it has no `results.json`."""
  path = workdir / "results.json"
  return json.loads(path.read_text()) if path.exists() else []


def mean_over_seeds(records: Sequence[Record], keys: Sequence[str] = KEYS) -> list[Record]:
  """Averages the records that have equal values of `keys`.

  Args:
    records: measurements of several seeds.
    keys: keys of a record that identify its measurement.

  Returns:
    One record per group, in the order of first occurrence. `value` is the mean. `interval` is half the
    range over seeds, as in the paper; for one record, its own interval. `n` is the sum of the records'
    `n`. `seed`, and any other key with different values, is a list over the records.
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
