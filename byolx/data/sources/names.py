"""Sequences of names of records. They hold millions of short strings in little memory.

`Names` holds all strings in one bytes object, with the offset at which each string ends. This is
fast to pickle: a worker process receives two objects rather than ImageNet's 1,281,167 Python strings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int, Int64

_ENCODING = ("utf-8", "surrogateescape")  # file names are bytes, not always text


@dataclass(frozen=True, eq=False, repr=False)
class Names(Sequence[str]):
  """Sequence of strings that are stored in one bytes object; `Names.of` makes it from strings.

  Args:
    buffer: all names in UTF-8, one after another without separators.
    ends: offset in `buffer` at which each name ends.
  """

  buffer: bytes
  ends: Int64[np.ndarray, "n"]

  @classmethod
  def of(cls, names: Iterable[str]) -> "Names":
    """Makes a `Names` from strings; file names that are not valid UTF-8 are preserved."""
    return _packed([name.encode(*_ENCODING) for name in names])

  @classmethod
  def joined(cls, parts: Sequence["Names"]) -> "Names":
    """Returns the names of all parts as one sequence."""
    starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts)]
    return cls(b"".join(part.buffer for part in parts), np.concatenate([*ends, _NONE]))

  def take(self, indices: Int[np.ndarray, "k"]) -> "Names":
    """Returns the names at `indices`, in the order of `indices`."""
    starts = np.concatenate([[0], self.ends])[:-1][indices].tolist()
    ends = self.ends[indices].tolist()
    return _packed([self.buffer[start:end] for start, end in zip(starts, ends)])

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: SupportsIndex | slice) -> "str | Names":
    if isinstance(index, slice):
      return self.take(np.arange(len(self))[index])
    index = range(len(self))[index]  # resolves negative indices, raises IndexError
    start = int(self.ends[index - 1]) if index else 0
    return self.buffer[start : int(self.ends[index])].decode(*_ENCODING)

  def __iter__(self) -> Iterator[str]:
    start = 0
    for end in self.ends.tolist():
      yield self.buffer[start:end].decode(*_ENCODING)
      start = end

  def __repr__(self) -> str:
    return f"Names({len(self)}: {', '.join(self[:3])}{', ...' if len(self) > 3 else ''})"


@dataclass(frozen=True)
class Numbered(Sequence[str]):
  """Sequence of the names `prefix/0`, `prefix/1`, ..., for records that have no names of their own."""

  prefix: str
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: SupportsIndex) -> str:
    return f"{self.prefix}/{range(self.count)[index]}"


@dataclass(frozen=True, eq=False)
class Picked(Sequence[str]):
  """Sequence of the elements of `names` at `indices`; the strings are not copied."""

  names: Sequence[str]
  indices: Int[np.ndarray, "k"]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: SupportsIndex) -> str:
    return self.names[int(self.indices[index])]


_NONE = np.empty(0, np.int64)


def _packed(encoded: list[bytes]) -> Names:
  lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
  return Names(b"".join(encoded), np.cumsum(lengths))
