"""ArrayRecord files that several threads and processes read at random."""

import os
import threading

from array_record.python.array_record_module import ArrayRecordReader

from byolx.data.decode import DecodeError

MAX_OPEN = 512
"""So many shards are open at once in a process, of the 1024 files that systems usually allow."""

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # to read at random, not one after another
_BUFFER = 32768


def open_shard(path: str, records: int) -> ArrayRecordReader:
  """Opens a shard that must have so many records.

  Raises:
    DecodeError: it is missing, damaged, or has another number of records.
  """
  reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
  if not reader.ok() or reader.num_records() != records:
    # The reader keeps its reasons to itself.
    what = "the shard cannot be opened" if os.path.isfile(path) else "the shard is missing"
    raise DecodeError(f"{what}; expected an ArrayRecord file of {records} records")
  return reader


def read_record(reader: ArrayRecordReader, position: int) -> bytes:
  """One record; raises DecodeError if it is damaged."""
  try:
    (data,) = reader.read([position])
  except (RuntimeError, ValueError) as error:
    raise DecodeError(f"the shard is damaged: {' '.join(str(error).split())}") from error
  return data


class Readers:
  """The shards that a process has open; a copy in another process starts with none."""

  def __init__(self):
    self._process = os.getpid()
    self._lock = threading.Lock()
    self._open: dict[str, ArrayRecordReader] = {}

  def __reduce__(self):
    return Readers, ()

  def get(self, path: str, records: int) -> ArrayRecordReader:
    """An open shard, which threads may share; raises DecodeError, see `open_shard`."""
    if self._process != os.getpid():  # a fork
      self.__init__()
    reader = self._open.get(path)
    if reader is None:
      reader = open_shard(path, records)
      with self._lock:
        while len(self._open) >= MAX_OPEN:
          del self._open[next(iter(self._open))]  # closed as soon as no thread reads from it
        self._open[path] = reader
    return reader
