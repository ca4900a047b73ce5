"""`byolx fields`: prints all config fields with their defaults and meanings."""

import argparse


def add(command) -> None:
  """Adds the command `byolx fields`.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  command("fields", _run, "list every config field with its default and meaning")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import schema

  for name, field in schema.fields().items():
    print(f"{name:<34} {field.default!s:<26} {field.meaning}")
  return 0
