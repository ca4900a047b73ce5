"""Text for messages: durations, shortened lists, errors in one line, tables."""

from collections.abc import Container, Sequence


def first_few(differences: list[str], most: int = 3) -> str:
  """Joins the first `most` differences, and adds the number of the remaining ones, if any."""
  more = len(differences) - most
  return "; ".join(differences[:most]) + (f"; and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
  """Returns an error's text in one line, or its type's name if it has no text.

  A text above 300 characters keeps its first 120, which mostly name the attempted operation, and its
  last 180, which mostly name the cause.
  """
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else f"{text[:120]} ... {text[-180:]}"


def duration(seconds: float) -> str:
  """Formats a duration in seconds, such as `2 h 05 min`, `3 min 20 s` or `12 s`."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
  return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
  """Rows as columns of equal width, two spaces apart.

  Args:
    rows: cells of every row, all rows equally long.
    right: numbers of the columns that are aligned to the right, from 0.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if number in right else cell.ljust(width)
      for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )
