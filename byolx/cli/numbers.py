"""Parsers of numbers in command arguments; an invalid text raises argparse.ArgumentTypeError."""

import argparse
import math


def seeds(text: str) -> list[int]:
  """Different seeds, each from 0 to 2**32 - 1, separated by commas."""
  seeds = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
  if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
    raise argparse.ArgumentTypeError(f"{text!r}: expected different whole numbers such as 0,1,2")
  return seeds


def counts(text: str) -> list[int]:
  """Whole numbers of at least 0, separated by commas; sorted, without repetitions."""
  parts = text.split(",")
  if not all(part.isdecimal() for part in parts):
    raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 0,2,4")
  return sorted(set(map(int, parts)))


def seconds(text: str) -> float:
  """Seconds, above 0 and below 3600."""
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < 3600:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, and below 3600")
  return seconds


def count(text: str) -> int:
  """Whole number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
  return int(text)


def index(text: str) -> int:
  """Whole number of at least 0."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
  return int(text)


def share(text: str) -> float:
  """Number from 0 to 1."""
  try:
    share = float(text)
  except ValueError:
    share = -1.0
  if not 0 <= share <= 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
  return share


def quality(text: str) -> int:
  """Whole number from 1 to 100."""
  if not text.isdecimal() or not 1 <= int(text) <= 100:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 100")
  return int(text)


def some_share(text: str) -> float:
  """Number above 0, and up to 1."""
  if not share(text):
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, and up to 1")
  return share(text)


def price(text: str) -> float:
  """Finite number of at least 0."""
  try:
    price = float(text)
  except ValueError:
    price = -1.0
  if not 0 <= price < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
  return price
