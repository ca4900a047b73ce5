"""Which records a step takes, and from which random numbers: a function of (seed, step) only.

Epoch e visits the records in the order `epoch_order(seed, e)`. The stream of all epochs is cut into
batches of exactly `batch_size`, across the ends of epochs: nothing is dropped, nothing is repeated,
and every record comes once per epoch whatever the batch size and the number of hosts. Every host
takes its block of each batch.

The random numbers of a view come from `Stream(seed).at(VIEW, record, epoch, view)`: Philox counters
(draw, purpose, epoch, view) under the key (seed, record).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32

VIEW, ORDER, REPLACEMENT, RANDAUGMENT = range(4)
"""What a generator is for: streams of different purposes share nothing."""


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int32[np.ndarray, "count"]:
  """The order in which an epoch visits `count` records: a permutation, read-only."""
  order = Stream(seed).at(ORDER, 0, epoch).permutation(count).astype(np.int32)
  order.flags.writeable = False
  return order


class Stream:
  """One generator that is moved from place to place, ten times faster than making new ones.

  Not for several threads at once.
  """

  def __init__(self, seed: int):
    self._seed = seed
    self._generator = np.random.Generator(np.random.Philox(key=0))

  def at(self, purpose: int, record: int, epoch: int = 0, view: int = 0) -> np.random.Generator:
    """The generator of this purpose, record, epoch and view, at its start."""
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
  """Which places of the stream of records are made together.

  Place p is number p % records of epoch p // records. A step's batch of `batch_size` places is cut
  into one block per host, and a host's block into `parts`, which are made one by one.

  Args:
    records: of the source.
    batch_size: of the global batch.
    host_index, host_count: this host has block number host_index.
    parts: at most the rows of a block.

  Raises:
    ValueError: a batch that cannot be cut evenly over the hosts.
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
    """Rows of this host's block."""
    return self.batch_size // self.host_count

  def of(self, number: int) -> range:
    """The places of part number step * parts + part."""
    step, part = divmod(number, self.parts)
    first = step * self.batch_size + self.host_index * self.local
    cut = [first + (part + end) * self.local // self.parts for end in (0, 1)]
    return range(*cut)
