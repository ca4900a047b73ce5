"""Text for messages: formats durations, long lists, errors and tables."""

from collections.abc import Container, Sequence


def first_few(differences: list[str], most: int = 3) -> str:
  """Joins the first `most` texts of a list, and adds the number of the remaining texts, if any."""
  more = len(differences) - most
  return "; ".join(differences[:most]) + (f"; and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
  """Returns an error's text in one line, or the name of the error's type if the text is empty.

  If the text has more than 300 characters, only the first 120 and the last 180 are kept. The first
  mostly name the attempted operation, and the last mostly name the cause.
  """
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else f"{text[:120]} ... {text[-180:]}"


def duration(seconds: float) -> str:
  """Formats a number of seconds as text, such as `2 h 05 min`, `3 min 20 s` or `12 s`."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
  return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
  """Formats rows of text as a table, whose columns are aligned and two spaces apart.

  Args:
    rows: cells of every row, all rows equally long.
    right: indices, from 0, of the columns that are aligned to the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if number in right else cell.ljust(width)
      for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )
