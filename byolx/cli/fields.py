"""`byolx fields`: list of the config fields."""

import argparse


def add(command) -> None:
  """Add `byolx fields` to the parser."""
  command("fields", _run, "list every config field with its default and meaning")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import schema

  for name, field in schema.fields().items():
    print(f"{name:<34} {field.default!s:<26} {field.meaning}")
  return 0
