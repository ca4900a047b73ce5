"""Names of records: millions of short strings that cost little to hold and to hand to a worker.

ImageNet's 1,281,167 file names take 120 MB as Python strings, which are pickled one by one. `Names`
keeps them as one run of bytes and the places where they end: 46 MB, pickled in a tenth of the time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int, Int64

_ENCODING = ("utf-8", "surrogateescape")  # file names are bytes, not always text


@dataclass(frozen=True, eq=False, repr=False)
class Names(Sequence[str]):
  """Strings in one buffer. Make them with `Names.of`.

  Args:
    buffer: all names, one after another, in UTF-8.
    ends: where each of them ends in the buffer.
  """

  buffer: bytes
  ends: Int64[np.ndarray, "n"]

  @classmethod
  def of(cls, names: Iterable[str]) -> "Names":
    """Packs strings; file names that are not UTF-8 come back as they were."""
    return _packed([name.encode(*_ENCODING) for name in names])

  @classmethod
  def joined(cls, parts: Sequence["Names"]) -> "Names":
    """The names of all parts, one part after another."""
    starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts)]
    return cls(b"".join(part.buffer for part in parts), np.concatenate([*ends, _NONE]))

  def take(self, indices: Int[np.ndarray, "k"]) -> "Names":
    """The names with these numbers, in this order."""
    starts = np.concatenate([[0], self.ends])[:-1][indices].tolist()
    ends = self.ends[indices].tolist()
    return _packed([self.buffer[start:end] for start, end in zip(starts, ends)])

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: SupportsIndex | slice) -> "str | Names":
    if isinstance(index, slice):
      return self.take(np.arange(len(self))[index])
    index = range(len(self))[index]  # from the end, where negative; IndexError, where there is none
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
  """The names `prefix/0`, `prefix/1`, ... of records that have no other."""

  prefix: str
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: SupportsIndex) -> str:
    return f"{self.prefix}/{range(self.count)[index]}"


@dataclass(frozen=True, eq=False)
class Picked(Sequence[str]):
  """Some of other names, looked up when asked for."""

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
