"""Sampler: the records of each step, and their random generators, as a function of (seed, step).

Epoch e visits the records in the order `epoch_order(seed, e)`. The stream of all epochs is cut into
batches of exactly `batch_size`, across the ends of epochs. So no record is dropped or repeated:
each is used once per epoch, whatever the batch size and the number of hosts. Each host has one
block of each batch.

The random numbers of a view are drawn from `Stream(seed).at(VIEW, record, epoch, view)`: Philox
counters (draw, purpose, epoch, view) under the key (seed, record).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32

VIEW, ORDER, REPLACEMENT, RANDAUGMENT = range(4)
"""Purposes of a generator; the streams of different purposes are independent."""


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int32[np.ndarray, "count"]:
  """Permutation of the records 0 to count - 1 in one epoch, as a read-only array."""
  order = Stream(seed).at(ORDER, 0, epoch).permutation(count).astype(np.int32)
  order.flags.writeable = False
  return order


class Stream:
  """Counter-based random generator with one independent stream per purpose, record, epoch and view.

  One generator is reused, which is faster than creating one per stream. It is not thread-safe.

  Args:
    seed: seed of the run.
  """

  def __init__(self, seed: int):
    self._seed = seed
    self._generator = np.random.Generator(np.random.Philox(key=0))

  def at(self, purpose: int, record: int, epoch: int = 0, view: int = 0) -> np.random.Generator:
    """Returns the generator at the start of a stream; it is valid until the next call.

    Args:
      purpose: VIEW, ORDER, REPLACEMENT or RANDAUGMENT.
      record: index of the record.
      epoch: index of the epoch.
      view: index of the view.
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
  """Cut of the stream of records into batches, blocks per host, and parts.

  Position p of the stream is element p % records of the order of epoch p // records. The batch of a
  step is `batch_size` positions. It is cut into one block per host, and a block into `parts` parts,
  which are loaded one by one.

  Attributes:
    records: number of records of the source.
    batch_size: number of rows of the global batch.
    host_index: index of this host, 0 to host_count - 1.
    host_count: number of hosts; it divides `batch_size`.
    parts: number of parts of a block, 1 to the rows of a block.

  Raises:
    ValueError: host_index is out of range, or batch_size is not a multiple of host_count.
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
    """Number of rows in the block of this host."""
    return self.batch_size // self.host_count

  def of(self, number: int) -> range:
    """Returns the positions of part `number` = step * parts + part."""
    step, part = divmod(number, self.parts)
    first = step * self.batch_size + self.host_index * self.local
    cut = [first + (part + end) * self.local // self.parts for end in (0, 1)]
    return range(*cut)
