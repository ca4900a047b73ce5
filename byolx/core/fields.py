"""Fields of configs: what each has besides its name, the checks, and how a dataclass declares them.

A group of fields is a frozen dataclass in the module that uses it:

  @dataclasses.dataclass(frozen=True)
  class LogSpec:
    every_steps: int = field(50, "between rows of metrics.jsonl", at_least(1), free=True)

`byolx.runs.schema` assembles the fields of a run from them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

_KEY = "byolx.field"

Number = int | float
Check = Callable[[Any], str | None]
"""Returns what was expected where a value is impossible, else None."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One field.

  Args:
    default: its value where neither file nor command sets it.
    meaning: one phrase for `byolx fields`.
    check: of a value.
    free: it may differ when a run is continued, since no result depends on it.
    encoder: it goes with an encoder: the function that was trained is its arrays and these fields.
  """

  default: Any
  meaning: str
  check: Check = lambda value: None
  free: bool = False
  encoder: bool = False


def field(
  default: Any,
  meaning: str,
  check: Check = lambda value: None,
  *,
  free: bool = False,
  encoder: bool = False,
) -> Any:
  """Declares a config field in a dataclass; arguments as `Field`."""
  declared = Field(default, meaning, check, free, encoder)
  return dataclasses.field(default=default, metadata={_KEY: declared})


def fields_of(group: Any) -> dict[str, Field]:
  """The config fields of a dataclass, by name, in the order of its declaration.

  Attributes that were not declared by `field` are none, but for those whose default is a dataclass: its
  fields have dotted names, and the defaults of that instance.

  Args:
    group: a frozen dataclass, or an instance, whose values are then the defaults.
  """
  found = {}
  for attribute in dataclasses.fields(group):
    default = getattr(group, attribute.name, None)
    if declared := attribute.metadata.get(_KEY):
      found[attribute.name] = dataclasses.replace(declared, default=default)
    elif dataclasses.is_dataclass(default):
      below = fields_of(default)
      found |= {f"{attribute.name}.{name}": field for name, field in below.items()}
  return found


def at_least(minimum: Number) -> Check:
  """A finite number, not below the minimum."""
  return lambda x: (
    None if math.isfinite(x) and x >= minimum else f"a finite number of at least {minimum}"
  )


def whole(minimum: int) -> Check:
  """A whole number, not below the minimum. For elements of lists, which have no type of their own."""
  return lambda x: (
    None if isinstance(x, int) and x >= minimum else f"a whole number of at least {minimum}"
  )


def above(minimum: Number) -> Check:
  """A finite number above the minimum."""
  return lambda x: None if math.isfinite(x) and x > minimum else f"a finite number above {minimum}"


def between(low: Number, high: Number) -> Check:
  """A number in [low, high]."""
  return lambda x: None if low <= x <= high else f"a number from {low} to {high}"


def one_of(*choices: str) -> Check:
  """One of a few names."""
  return lambda x: None if x in choices else f"one of {', '.join(choices)}"


def interval(low: Number, high: Number, top: str = "") -> Check:
  """Two numbers in order, both in [low, high]; `top` says what `high` means."""
  return lambda pair: (
    None
    if len(pair) == 2 and low <= pair[0] <= pair[1] <= high
    else f"two numbers in order, from {low} to {high}{top and f', {top}'}"
  )


def each(check: Check, length: int | None = None) -> Check:
  """A list of values that all pass."""

  def of_list(values: Sequence[Any]) -> str | None:
    if length is not None and len(values) != length:
      return f"{length} values"
    return next((f"each {wanted}" for wanted in map(check, values) if wanted), None)

  return of_list
