"""The records of `results.json`: read, and averaged over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
"""One measurement: task, protocol, encoder, labels, split, metric, value, interval, n, seed, ..."""

KEYS = ("task", "protocol", "encoder", "labels", "split", "metric", "step", "commit")
"""What records of different seeds have in common where they measure the same."""


def read(workdir: Path) -> list[Record]:
  """The records of a workdir; none where it has no `results.json`."""
  path = workdir / "results.json"
  return json.loads(path.read_text()) if path.exists() else []


def mean_over_seeds(records: Sequence[Record], keys: Sequence[str] = KEYS) -> list[Record]:
  """Records that agree in `keys`, averaged, in the order of the first of each.

  `interval` is half the range over seeds, as the paper states it, that of the record for one seed; `n`
  is the sum of theirs; `seed` lists the seeds, and so does anything else in which they differ.
  """
  groups: dict[tuple, list[Record]] = {}
  for record in records:
    groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
  return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Record]) -> Record:
  every = {name: [record.get(name) for record in group] for name in group[0]}
  values = every["value"]
  return {
    **{name: each if each != each[:1] * len(each) else each[0] for name, each in every.items()},
    "value": float(np.mean(values)),
    "interval": float(np.ptp(values) / 2) if len(values) > 1 else group[0].get("interval"),
    "n": sum(every["n"]),
    "seed": every["seed"],
  }
