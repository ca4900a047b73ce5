"""Sampler: computes the records of each step, and their random generators, from seed and step alone.

A record is an example of the data set. Epoch e visits the records in the order `epoch_order(seed, e)`.
The epochs are joined to one endless stream. The stream is divided into batches of exactly `batch_size`
records, so a batch may cover the end of one epoch and the start of the next. Each record is used exactly
once per epoch, for any batch size and any number of hosts. Each host loads one block of rows of each
batch.

The random numbers of a view are drawn from `Stream(seed).at(VIEW, record, epoch, view)`, a Philox
generator with the key (seed, record) and the counter (draw, purpose, epoch, view).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32

VIEW, ORDER, REPLACEMENT, RANDAUGMENT = range(4)
"""Purposes of random numbers; those of different purposes are independent of each other."""


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int32[np.ndarray, "count"]:
  """Returns the order of the examples in one epoch: a read-only permutation of 0 to count - 1."""
  order = Stream(seed).at(ORDER, 0, epoch).permutation(count).astype(np.int32)
  order.flags.writeable = False
  return order


class Stream:
  """Random generator with an independent stream of numbers for each purpose, record, epoch and view.

  One numpy generator is reused for all streams, which is faster than creating a new one each time. So
  a `Stream` must not be shared by threads.

  Args:
    seed: seed of the run.
  """

  def __init__(self, seed: int):
    self._seed = seed
    self._generator = np.random.Generator(np.random.Philox(key=0))

  def at(self, purpose: int, record: int, epoch: int = 0, view: int = 0) -> np.random.Generator:
    """Returns a generator at the start of one stream of numbers. Use it only until the next call of `at`.

    Args:
      purpose: purpose of the numbers: VIEW, ORDER, REPLACEMENT or RANDAUGMENT.
      record: index of the record, from 0.
      epoch: index of the epoch, from 0.
      view: index of the view, from 0.
    """
    self._generator.bit_generator.state = {
      "bit_generator": "Philox",
      "state": {"key": (self._seed, record), "counter": (0, purpose, epoch, view)},
      "buffer": (0, 0, 0, 0),
      "buffer_pos": 4,
      "has_uint32": 0,
      "uinteger": 0,
    }
    return self._generator


@dataclass(frozen=True)
class Rows:
  """Division of the endless stream of records (examples) into batches, and of a batch among the hosts.

  In training, the stream joins all epochs. Position p belongs to epoch p // records, and has the record
  at place p % records in the order of that epoch. The batch of each step is the next `batch_size`
  positions. It is divided into one block per host, all of equal size. A host loads its block in `parts`
  parts, one by one. In evaluation, position p has the record p, and positions after the last record are
  rows of padding.

  Attributes:
    records: number of records (examples) of the data source.
    batch_size: number of rows of the global batch.
    host_index: index of this host, 0 to host_count - 1.
    host_count: number of hosts; it divides `batch_size`.
    parts: number of parts in which a host loads its block, from 1 to the number of rows of the block.

  Raises:
    ValueError: host_index is out of range, or batch_size is not a positive multiple of host_count.
  """

  records: int
  batch_size: int
  host_index: int = 0
  host_count: int = 1
  parts: int = 1

  def __post_init__(self):
    if not 0 <= self.host_index < self.host_count:
      raise ValueError(
        f"host_index is {self.host_index} of {self.host_count}; expected 0 <= index < count"
      )
    if self.batch_size < 1 or self.batch_size % self.host_count:
      raise ValueError(
        f"batch_size is {self.batch_size}; expected a positive multiple of {self.host_count} hosts"
      )

  @property
  def local(self) -> int:
    """Number of rows of each batch that this host loads."""
    return self.batch_size // self.host_count

  def of(self, number: int) -> range:
    """Returns the rows of one part of a batch on this host, as positions in the stream of records.

    Args:
      number: number of the part, counted over all steps. It is step * parts + i for part i of a step.
    """
    step, part = divmod(number, self.parts)
    first = step * self.batch_size + self.host_index * self.local
    cut = [first + (part + end) * self.local // self.parts for end in (0, 1)]
    return range(*cut)
