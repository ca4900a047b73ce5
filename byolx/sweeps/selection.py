"""Choosing hyperparameters on validation images: which record speaks for a run, and which run is best."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from byolx.core.config import ConfigError
from byolx.runs import results

SMALLER_IS_BETTER = frozenset({"loss", "rms", "rel"})
_TELLING = ("protocol", "encoder", "labels")


@dataclasses.dataclass(frozen=True)
class By:
  """What is compared: a metric, of the records that have these values where several have it."""

  metric: str = "top1"
  only: tuple[tuple[str, str], ...] = ()

  @property
  def smaller(self) -> bool:
    """Whether the smallest value is the best."""
    return self.metric in SMALLER_IS_BETTER

  def __str__(self) -> str:
    return self.metric + ":" * bool(self.only) + ",".join(f"{k}={v}" for k, v in self.only)

  def show(self, value: float) -> str:
    """A value as tables have it: shares in %."""
    return f"{value:.4g}" if self.smaller else f"{100 * value:.1f} %"


TOP1 = By()


def parse(text: str) -> By:
  """`METRIC[:KEY=VALUE,...]`.

  Raises:
    ConfigError: it is something else.
  """
  metric, _, rest = text.partition(":")
  only = tuple(tuple(part.split("=", 1)) for part in rest.split(",") if part)
  if not metric or any(len(pair) < 2 or pair[0] not in _TELLING for pair in only):
    raise ConfigError(
      f"--select={text}: expected METRIC or METRIC:KEY=VALUE,... with keys {', '.join(_TELLING)}"
    )
  return By(metric, only)


def record(records: Sequence[results.Record], by: By, origin: str) -> results.Record:
  """The validation record that speaks for a run; of several rates the chosen one, or the best.

  Args:
    records: of the run's `results.json`.
    origin: named in errors.

  Raises:
    ConfigError: there is none, or there are several of different things.
  """
  found = [
    each
    for each in records
    if each["split"] == "validation"
    and each["metric"] == by.metric
    and all(str(each.get(key)) == value for key, value in by.only)
  ]
  if not found:
    had = sorted({_describe(each) for each in records if each["split"] == "validation"})
    raise ConfigError(
      f"{origin}: no validation record of --select={by}; expected one of: {'; '.join(had) or 'none'}"
    )
  for key in _TELLING:
    values = list(dict.fromkeys(str(each.get(key)) for each in found))
    if len(values) > 1:
      raise ConfigError(
        f"{origin}: validation records of --select={by} differ in {key}; expected one of "
        + ", ".join(f"{key}={value}" for value in values)
        + f" after a colon, as --select={by.metric}:{key}={values[0]}"
      )
  found = [each for each in found if each.get("chosen")] or found
  return found[best([each["value"] for each in found], by)]


def _describe(each: results.Record) -> str:
  return f"{each['metric']}:" + ",".join(f"{key}={each.get(key)}" for key in _TELLING)


def best(values: Sequence[float], by: By) -> int:
  """Index of the best value; of equal ones the first. What is not finite is the worst."""
  sign = -1 if by.smaller else 1
  ranked = [sign * value if math.isfinite(value) else -math.inf for value in values]
  return ranked.index(max(ranked))


def edges(
  chosen: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], apart: Sequence[str] = ()
) -> list[str]:
  """The numeric fields of which the chosen cell has the least or the greatest value, in words.

  Args:
    chosen: one of the cells.
    cells: that were compared.
    apart: fields that are not compared.
  """
  found = []
  for name, value in chosen.items():
    values = {cell[name] for cell in cells if name in cell}
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric and name not in apart and len(values) > 1 and value in (min(values), max(values)):
      found.append(f"{name}={value}, of {min(values)} to {max(values)}")
  return found
