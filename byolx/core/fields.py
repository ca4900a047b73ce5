"""Fields of configs: their declaration in dataclasses, and checks of their values.

A group of fields is a frozen dataclass in the module that uses it:

  @dataclasses.dataclass(frozen=True)
  class LogSpec:
    every_steps: int = field(50, "steps between rows of metrics.jsonl", at_least(1), free=True)

`byolx.runs.schema` assembles the fields of a run from these groups.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

_KEY = "byolx.field"

Number = int | float
Check = Callable[[Any], str | None]
"""Function of a value: None if it is possible, else a description of the expected values."""


@dataclasses.dataclass(frozen=True)
class Field:
  """Properties of a config field.

  Args:
    default: value of the field if neither a file nor an override sets it.
    meaning: short description, for `byolx fields`.
    check: check of a value of the default's type.
    free: True if no result depends on the field, so it may change when a run is resumed.
    encoder: True if the field determines, with the encoder's arrays, the function of an encoder.
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
  """Declares a config field in a dataclass; arguments as in `Field`."""
  declared = Field(default, meaning, check, free, encoder)
  return dataclasses.field(default=default, metadata={_KEY: declared})


def fields_of(group: Any) -> dict[str, Field]:
  """Returns the config fields of a dataclass by name, in the order of declaration.

  These are the attributes declared by `field`. If the default of another attribute is a dataclass
  instance, its fields are included with dotted names, and its values as their defaults.

  Args:
    group: frozen dataclass, or an instance of one, whose values then are the defaults.
  """
  declared_fields = {}
  for attribute in dataclasses.fields(group):
    default = getattr(group, attribute.name, None)
    if declared := attribute.metadata.get(_KEY):
      declared_fields[attribute.name] = dataclasses.replace(declared, default=default)
    elif dataclasses.is_dataclass(default):
      nested = fields_of(default)
      declared_fields |= {f"{attribute.name}.{name}": field for name, field in nested.items()}
  return declared_fields


def at_least(minimum: Number) -> Check:
  """Check: a finite number, at least the minimum."""
  return lambda x: (
    None if math.isfinite(x) and x >= minimum else f"a finite number of at least {minimum}"
  )


def whole(minimum: int) -> Check:
  """Check: an integer, at least the minimum; for elements of lists, whose type is not checked."""
  return lambda x: (
    None if isinstance(x, int) and x >= minimum else f"a whole number of at least {minimum}"
  )


def above(minimum: Number) -> Check:
  """Check: a finite number above the minimum."""
  return lambda x: None if math.isfinite(x) and x > minimum else f"a finite number above {minimum}"


def between(low: Number, high: Number) -> Check:
  """Check: a number in [low, high]."""
  return lambda x: None if low <= x <= high else f"a number from {low} to {high}"


def one_of(*choices: str) -> Check:
  """Check: one of the choices."""
  return lambda x: None if x in choices else f"one of {', '.join(choices)}"


def interval(low: Number, high: Number, top: str = "") -> Check:
  """Check: two increasing numbers in [low, high]; `top` is the meaning of `high`, for messages."""
  return lambda pair: (
    None
    if len(pair) == 2 and low <= pair[0] <= pair[1] <= high
    else f"two numbers in order, from {low} to {high}{top and f', {top}'}"
  )


def each(check: Check, length: int | None = None) -> Check:
  """Check: a list whose elements all pass a check; `length` is its length, None for any."""

  def check_all(values: Sequence[Any]) -> str | None:
    if length is not None and len(values) != length:
      return f"{length} values"
    return next((f"each {expected}" for expected in map(check, values) if expected), None)

  return check_all
