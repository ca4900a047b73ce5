"""Functions that parse numbers in command-line arguments.

Each raises argparse.ArgumentTypeError if the text is invalid. argparse then prints the message.
"""

import argparse
import math


def seeds(text: str) -> list[int]:
  """Parses seeds separated by commas, such as "0,1,2", and returns them in the given order.

  Raises:
    argparse.ArgumentTypeError: a seed is not from 0 to 2**32 - 1, or two seeds are equal.
  """
  seeds = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
  if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
    raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers such as 0,1,2")
  return seeds


def counts(text: str) -> list[int]:
  """Parses whole numbers of at least 0, separated by commas, and returns them sorted.

  A repeated number is returned once.

  Raises:
    argparse.ArgumentTypeError: a part of the text is not such a number.
  """
  parts = text.split(",")
  if not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 0,2,4")
  return sorted(set(map(int, parts)))


def seconds(text: str) -> float:
  """Parses a duration in seconds, above 0 and below 3600.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < 3600:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, and below 3600")
  return seconds


def count(text: str) -> int:
  """Parses a whole number of at least 1, such as a number of processes.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
  return int(text)


def index(text: str) -> int:
  """Parses a whole number of at least 0, such as an index.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
  return int(text)


def share(text: str) -> float:
  """Parses a share, a number from 0 to 1.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  try:
    share = float(text)
  except ValueError:
    share = -1.0
  if not 0 <= share <= 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
  return share


def quality(text: str) -> int:
  """Parses a JPEG quality, a whole number from 1 to 100.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  if not text.isdecimal() or not 1 <= int(text) <= 100:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 100")
  return int(text)


def some_share(text: str) -> float:
  """Parses a share that must not be 0: a number above 0 and at most 1.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  if not share(text):
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, and up to 1")
  return share(text)


def price(text: str) -> float:
  """Parses a price, a finite number of at least 0.

  Raises:
    argparse.ArgumentTypeError: the text is not such a number.
  """
  try:
    price = float(text)
  except ValueError:
    price = -1.0
  if not 0 <= price < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
  return price
