"""Choice of hyperparameters on validation images: the compared record of a run, and the best run."""

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
  """Criterion of the choice: a metric, and values that select one of several records with it.

  Args:
    metric: name of the metric, such as "top1".
    only: (key, value) pairs that the record must have; keys are protocol, encoder and labels.
  """

  metric: str = "top1"
  only: tuple[tuple[str, str], ...] = ()

  @property
  def smaller(self) -> bool:
    """Whether the smallest value is the best."""
    return self.metric in SMALLER_IS_BETTER

  def __str__(self) -> str:
    return self.metric + ":" * bool(self.only) + ",".join(f"{k}={v}" for k, v in self.only)

  def show(self, value: float) -> str:
    """Text of a value: shares in %, losses and errors as they are."""
    return f"{value:.4g}" if self.smaller else f"{100 * value:.1f} %"


TOP1 = By()


def parse(text: str) -> By:
  """Parse a criterion written as `METRIC[:KEY=VALUE,...]`.

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
  """Select the validation record by which a run is compared.

  If the run has records of several learning rates, this is the chosen one, or else the best one.

  Args:
    records: records of the run's `results.json`.
    by: criterion.
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
  """Index of the best value, or of the first of equal ones. A NaN or infinite value is the worst."""
  sign = -1 if by.smaller else 1
  ranked = [sign * value if math.isfinite(value) else -math.inf for value in values]
  return ranked.index(max(ranked))


def edges(
  chosen: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], excluded: Sequence[str] = ()
) -> list[str]:
  """Numeric fields in which the chosen cell has the smallest or the largest value of the grid.

  Args:
    chosen: fields and values of the chosen cell.
    cells: fields and values of all compared cells, including the chosen one.
    excluded: fields to skip.

  Returns:
    One text per field: `width=1, of 1 to 4`.
  """
  descriptions = []
  for name, value in chosen.items():
    values = {cell[name] for cell in cells if name in cell}
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric and name not in excluded and len(values) > 1 and value in (min(values), max(values)):
      descriptions.append(f"{name}={value}, of {min(values)} to {max(values)}")
  return descriptions
