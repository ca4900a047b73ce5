"""Config fields: how a dataclass declares them, and checks of their values.

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
"""Function that checks a value: it returns None if the value is possible, else a description of the
values that are."""


@dataclasses.dataclass(frozen=True)
class Field:
  """Properties of a config field.

  Args:
    default: value of the field if neither a file nor an override sets it.
    meaning: short description, which `byolx fields` prints.
    check: function that takes a value, which already has the type of the default. It returns None if
      the value is possible, else a text that describes the possible values.
    free: whether the field may change when a run is resumed, because no result depends on it.
    encoder: whether a pretrained encoder must be used with the same value of the field, because its
      outputs would differ with another value.
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
  """Declares a config field, as an attribute of a dataclass.

  Args:
    default: value of the field if neither a file nor an override sets it.
    meaning: short description, which `byolx fields` prints.
    check: function that takes a value. It returns None if the value is possible, else a text that
      describes the possible values.
    free: whether the field may change when a run is resumed, because no result depends on it.
    encoder: whether a pretrained encoder must be used with the same value of the field, because its
      outputs would differ with another value.
  """
  declared = Field(default, meaning, check, free, encoder)
  return dataclasses.field(default=default, metadata={_KEY: declared})


def fields_of(group: Any) -> dict[str, Field]:
  """Returns the config fields of a dataclass by name, in the order of declaration.

  Config fields are the attributes declared by `field`. If the default of another attribute is a
  dataclass instance, the fields of that instance are included, with dotted names. The values of the
  instance are their defaults.

  Args:
    group: frozen dataclass, or an instance of one. The values of an instance are returned as the
      defaults.
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
  """Returns a check of a config field, which accepts finite numbers of at least `minimum`."""
  return lambda x: (
    None if math.isfinite(x) and x >= minimum else f"a finite number of at least {minimum}"
  )


def whole(minimum: int) -> Check:
  """Returns a check of a config field, which accepts integers of at least `minimum`.

  It is used for elements of lists, because nothing else checks their type.
  """
  return lambda x: (
    None if isinstance(x, int) and x >= minimum else f"a whole number of at least {minimum}"
  )


def above(minimum: Number) -> Check:
  """Returns a check of a config field, which accepts finite numbers above `minimum`."""
  return lambda x: None if math.isfinite(x) and x > minimum else f"a finite number above {minimum}"


def between(low: Number, high: Number) -> Check:
  """Returns a check of a config field, which accepts numbers in [low, high]."""
  return lambda x: None if low <= x <= high else f"a number from {low} to {high}"


def one_of(*choices: str) -> Check:
  """Returns a check of a config field, which accepts only the given texts."""
  return lambda x: None if x in choices else f"one of {', '.join(choices)}"


def interval(low: Number, high: Number, top: str = "") -> Check:
  """Returns a check of a config field, which accepts two numbers a <= b in [low, high].

  Args:
    low: least possible number.
    high: largest possible number.
    top: meaning of `high`, which the message for other values contains; empty to leave it out.
  """
  return lambda pair: (
    None
    if len(pair) == 2 and low <= pair[0] <= pair[1] <= high
    else f"two numbers in order, from {low} to {high}{top and f', {top}'}"
  )


def each(check: Check, length: int | None = None) -> Check:
  """Returns a check of a config field, which accepts a list if `check` accepts each element.

  Args:
    check: check of one element.
    length: number of elements that the list must have; None for any number.
  """

  def check_all(values: Sequence[Any]) -> str | None:
    if length is not None and len(values) != length:
      return f"{length} values"
    return next((f"each {expected}" for expected in map(check, values) if expected), None)

  return check_all
