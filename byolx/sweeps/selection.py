"""Selects the validation result by which a sweep compares runs, and the best of several runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from byolx.core.config import ConfigError
from byolx.runs import results

SMALLER_IS_BETTER = frozenset({"loss", "rms", "rel"})
_KEYS = ("protocol", "encoder", "labels")


@dataclasses.dataclass(frozen=True)
class By:
  """Criterion by which a sweep compares runs: a metric on validation images.

  A run may have several results of the same metric, for several evaluation protocols, encoders or
  shares of labels. `only` selects the result that is compared.

  Args:
    metric: name of the metric, such as "top1".
    only: (key, value) pairs that the compared result must have. The keys are "protocol", "encoder"
      and "labels".
  """

  metric: str = "top1"
  only: tuple[tuple[str, str], ...] = ()

  @property
  def smaller(self) -> bool:
    """Whether the smallest value of the metric is the best."""
    return self.metric in SMALLER_IS_BETTER

  def __str__(self) -> str:
    return self.metric + ":" * bool(self.only) + ",".join(f"{k}={v}" for k, v in self.only)

  def show(self, value: float) -> str:
    """Returns a value of the metric as text: accuracies in %, losses and errors with 4 digits."""
    return f"{value:.4g}" if self.smaller else f"{100 * value:.1f} %"


TOP1 = By()


def parse(text: str) -> By:
  """Parses the criterion by which a sweep compares runs, written as `METRIC[:KEY=VALUE,...]`.

  Example: `top1:protocol=linear,encoder=online`.

  Raises:
    ConfigError: the text has another form, or an unknown key.
  """
  metric, _, rest = text.partition(":")
  only = tuple(tuple(part.split("=", 1)) for part in rest.split(",") if part)
  if not metric or any(len(pair) < 2 or pair[0] not in _KEYS for pair in only):
    raise ConfigError(
      f"--select={text}: expected METRIC or METRIC:KEY=VALUE,... with keys {', '.join(_KEYS)}"
    )
  return By(metric, only)


def record(records: Sequence[results.Record], by: By, origin: str) -> results.Record:
  """Returns the validation record by which a run is compared with other runs.

  A record is a dictionary of one result. If the run has several learning rates, several records
  match the criterion. Then the record of the chosen rate is returned. If no record is marked as
  chosen, the one with the best value is returned.

  Args:
    records: all records in the run's `results.json`.
    by: metric that is compared, and values that the record must have, such as its protocol.
    origin: name of the run in error messages.

  Raises:
    ConfigError: no record matches the criterion, or the matching records differ in protocol, encoder or
      labels.
  """
  matching = [
    candidate
    for candidate in records
    if candidate["split"] == "validation"
    and candidate["metric"] == by.metric
    and all(str(candidate.get(key)) == value for key, value in by.only)
  ]
  if not matching:
    available = sorted(
      {_describe(candidate) for candidate in records if candidate["split"] == "validation"}
    )
    raise ConfigError(
      f"{origin}: no validation record of --select={by}; expected one of: "
      + ("; ".join(available) or "none")
    )
  for key in _KEYS:
    values = list(dict.fromkeys(str(candidate.get(key)) for candidate in matching))
    if len(values) > 1:
      raise ConfigError(
        f"{origin}: validation records of --select={by} differ in {key}; expected one of "
        + ", ".join(f"{key}={value}" for value in values)
        + f" after a colon, as --select={by.metric}:{key}={values[0]}"
      )
  matching = [candidate for candidate in matching if candidate.get("chosen")] or matching
  return matching[best([candidate["value"] for candidate in matching], by)]


def _describe(candidate: results.Record) -> str:
  return f"{candidate['metric']}:" + ",".join(f"{key}={candidate.get(key)}" for key in _KEYS)


def best(values: Sequence[float], by: By) -> int:
  """Returns the index of the best value, or of the first of several equal ones.

  NaN and infinite values count as the worst.

  Args:
    values: values of a metric, at least one.
    by: criterion of the comparison, with the metric. The largest value is the best. For losses and
      errors, the smallest value is the best.
  """
  sign = -1 if by.smaller else 1
  ranked = [sign * value if math.isfinite(value) else -math.inf for value in values]
  return ranked.index(max(ranked))


def edges(
  chosen: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], excluded: Sequence[str] = ()
) -> list[str]:
  """Describes the numeric config fields for which the chosen value is at an edge of the grid.

  A value is at an edge if it is the smallest or the largest value of the field in the grid. A better
  value may then be outside the grid.

  Args:
    chosen: fields and values of the chosen cell (setting).
    cells: fields and values of all compared cells, including the chosen one.
    excluded: names of fields to skip.

  Returns:
    One text per field, such as `width=1, of 1 to 4`.
  """
  descriptions = []
  for name, value in chosen.items():
    values = {cell[name] for cell in cells if name in cell}
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric and name not in excluded and len(values) > 1 and value in (min(values), max(values)):
      descriptions.append(f"{name}={value}, of {min(values)} to {max(values)}")
  return descriptions
