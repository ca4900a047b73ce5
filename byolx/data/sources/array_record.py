"""Reads single records of ArrayRecord files (shards of a data set) from any thread or process."""

import os
import threading

from array_record.python.array_record_module import ArrayRecordReader

from byolx.data.decode import DecodeError

MAX_OPEN = 512
"""Largest number of ArrayRecord files open in a process; most systems allow a process 1024 files."""

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access: nothing is read ahead
_BUFFER = 32768


def open_shard(path: str, records: int) -> ArrayRecordReader:
  """Opens a shard (one ArrayRecord file of a data set) and checks its number of records.

  Args:
    path: path of the ArrayRecord file.
    records: expected number of records.

  Raises:
    DecodeError: the shard is missing, damaged, or has another number of records.
  """
  reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
  if not reader.ok() or reader.num_records() != records:
    # The reader gives no reason for its failure.
    reason = "the shard cannot be opened" if os.path.isfile(path) else "the shard is missing"
    raise DecodeError(f"{reason}; expected an ArrayRecord file of {records} records")
  return reader


def read_record(reader: ArrayRecordReader, position: int) -> bytes:
  """Reads one record of a shard (an ArrayRecord file), and returns the bytes.

  Args:
    reader: reader of the open shard.
    position: index of the record in the shard, 0 to records - 1.

  Raises:
    DecodeError: the record is damaged.
  """
  try:
    (data,) = reader.read([position])
  except (RuntimeError, ValueError) as error:
    raise DecodeError(f"the shard is damaged: {' '.join(str(error).split())}") from error
  return data


class Readers:
  """Cache of the ArrayRecord files that this process has open; it is empty in a pickled copy."""

  def __init__(self):
    self._process = os.getpid()
    self._lock = threading.Lock()
    self._open: dict[str, ArrayRecordReader] = {}

  def __reduce__(self):
    return Readers, ()

  def get(self, path: str, records: int) -> ArrayRecordReader:
    """Returns the reader of a shard (an ArrayRecord file), and opens the file at the first call.

    Threads may share the reader.

    Args:
      path: path of the ArrayRecord file.
      records: expected number of records.

    Raises:
      DecodeError: the shard is missing, damaged, or has another number of records.
    """
    if self._process != os.getpid():  # after a fork
      self.__init__()
    reader = self._open.get(path)
    if reader is None:
      reader = open_shard(path, records)
      with self._lock:
        while len(self._open) >= MAX_OPEN:
          del self._open[next(iter(self._open))]  # closed as soon as no thread reads from it
        self._open[path] = reader
    return reader
