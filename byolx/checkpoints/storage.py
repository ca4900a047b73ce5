"""Format of one checkpoint on disk, written in the background and read by orbax.

  STEP/state/    every array under its dotted name, in orbax's format
  STEP/record/   record.json: format, step, time, position in the training data, facts about the
                 run, metrics, type, shape and checksum of every array, and a CRC-32 of all this

A folder is written under a temporary name and renamed when it is complete. Writes are throttled
until `Writer.stop_throttling` is called, so that they slow down training less.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from byolx.core.text import one_line

FORMAT = 1
"""Version of the checkpoint format. It is increased when older code could not read new checkpoints."""

TEMPORARY = ".orbax-checkpoint-tmp"
"""Text that the name of every incomplete checkpoint folder contains."""

IN_FLIGHT = 2**26
"""Largest number of bytes of arrays that are being written, or read, at one time. At least two
arrays of the largest size can always be read at one time."""

CHUNK = 2**25
"""Size in bytes of the chunks in which an array is stored. A chunk is read as a whole, even if a
device needs only a part of it."""

_FILE = "record.json"


class CheckpointError(RuntimeError):
  """Raised if a checkpoint is missing, cannot be used, or could not be saved."""


class DamagedError(CheckpointError):
  """Raised if files of a checkpoint are missing or changed."""


def named(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree by their dotted paths, such as `params.online.encoder.stem.kernel`.

  The key `value` of an nnx variable is left out of the path.

  Raises:
    ValueError: two leaves have the same name.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  by_name = {".".join(_names(path)): leaf for path, leaf in leaves}
  if len(by_name) < len(leaves):
    raise ValueError(f"{len(leaves)} arrays have only {len(by_name)} different names")
  return by_name


def _names(path: tuple[Any, ...]) -> list[str]:
  names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
  return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def kind(array: Any) -> str:
  """Returns an array's type and shape as text, such as `float32[8, 10]`."""
  return f"{array.dtype}{list(array.shape)}"


def shape_of(kind: str) -> tuple[int, ...]:
  """Returns the shape that a text contains; for the text `float32[8, 10]`, it is (8, 10)."""
  return tuple(int(size) for size in kind.partition("[")[2].rstrip("]").split(",") if size)


class Writer:
  """Saves checkpoints to disk in the background, one at a time."""

  def __init__(self):
    _quiet_orbax()
    self._unthrottled = threading.Event()
    self._arrays = _ArrayHandler(self._unthrottled)
    arrays = ocp.PyTreeCheckpointHandler(
      use_compression=False,  # weights hardly compress
      type_handler_registry=_registry(self._arrays),
    )
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(state=arrays, record=_RecordHandler())
    )

  def save(
    self,
    folder: Path,
    arrays: Mapping[str, jax.Array],
    record: dict[str, Any],
    checksums: Callable[[], dict[str, int]],
  ) -> None:
    """Starts saving a checkpoint in the background.

    The writes are throttled until `stop_throttling` is called, so that they slow down training less.

    Args:
      folder: folder of the checkpoint.
      arrays: arrays by name, which may be donated after the call.
      record: contents of record.json, to which types, shapes and checksums of the arrays are added.
      checksums: function that returns the checksum of each array by name; it is called in the
        background.
    """
    self._unthrottled.clear()
    chunks = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=CHUNK))
    kinds = {name: kind(array) for name, array in arrays.items()}
    self._checkpointer.save(
      folder.absolute(),
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays), save_args=chunks),
        record=_RecordSave(record, kinds, checksums),
      ),
    )

  def stop_throttling(self) -> None:
    """Lets the save in progress write at full speed; the next save is throttled again."""
    self._unthrottled.set()

  def wait(self) -> None:
    """Waits until the save in progress has ended, including all of its writes.

    If the save failed, its error is raised.
    """
    try:
      self._checkpointer.wait_until_finished()
    finally:
      self._arrays.wait_for_writes()

  def close(self) -> None:
    """Waits for the save in progress and closes the writer."""
    self._checkpointer.close()


def read_record(folder: Path) -> dict[str, Any]:
  """Reads record.json of a checkpoint: facts about the run and the saved arrays.

  Args:
    folder: folder of the checkpoint.

  Returns:
    A dictionary with the keys `format`, `step`, `time`, `data`, `meta`, `metrics` and `arrays`. `arrays`
    maps the name of each array to a list of two: a text with its type and shape, such as
    `float32[8, 10]`, and its checksum.

  Raises:
    DamagedError: the record is missing or damaged.
    CheckpointError: the checkpoint has a newer format, or the record is not readable.
  """
  path = folder / "record" / _FILE
  try:
    contents = json.loads(path.read_bytes())
    record, crc = contents["record"], contents["crc32"]
  except FileNotFoundError:
    raise DamagedError(f"{path.relative_to(folder)} is missing") from None
  except PermissionError as error:
    raise CheckpointError(f"{path}: {error.strerror}") from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DamagedError(f"{path.relative_to(folder)}: {one_line(error)}") from None
  if zlib.crc32(_canonical(record).encode()) != crc:
    raise DamagedError(f"{path.relative_to(folder)}: crc32 mismatch")
  if record["format"] > FORMAT:
    raise CheckpointError(
      f"{folder} is of format {record['format']}; this version reads up to format {FORMAT}"
    )
  return record


def read_arrays(
  folder: Path, templates: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads the given arrays of a checkpoint; other arrays are not read from disk.

  Args:
    folder: folder of the checkpoint.
    templates: shape, type and sharding of each array to read, by name.

  Raises:
    DamagedError: an array cannot be read, or has another type or shape.
    CheckpointError: permission to read the files is missing.
  """
  _quiet_orbax()
  largest = max(array.size * array.dtype.itemsize for array in templates.values())
  handler = ocp.PyTreeCheckpointHandler(
    restore_concurrent_gb=max(IN_FLIGHT, 2 * largest + 1) / 10**9,
    type_handler_registry=_registry(_ArrayHandler(threading.Event())),
  )
  places = {
    name: ocp.ArrayRestoreArgs(sharding=array.sharding, strict=True)
    for name, array in templates.items()
  }
  restore = ocp.args.PyTreeRestore(item=dict(templates), restore_args=places, partial_restore=True)
  try:
    arrays = handler.restore((folder / "state").absolute(), args=restore)
    arrays = jax.block_until_ready({name: arrays[name] for name in templates})
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # orbax passes on all errors of its libraries, and raises Exception
    line = one_line(error)
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in line:
      raise CheckpointError(f"{folder}: {line}") from None
    raise DamagedError(f"its arrays cannot be read: {line}") from None
  for name, array in templates.items():
    if kind(arrays[name]) != kind(array):
      raise DamagedError(f"{name} is {kind(arrays[name])}, expected {kind(array)}")
  return arrays


def verify_checksums(record: dict[str, Any], checksums: Mapping[str, int]) -> None:
  """Checks that the checksums of arrays are equal to those in a checkpoint's record.

  Args:
    record: record of the checkpoint, the contents of record.json.
    checksums: checksums of the arrays that were read, by name.

  Raises:
    DamagedError: a checksum differs.
  """
  wrong = [name for name, value in checksums.items() if record["arrays"][name][1] != value]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise DamagedError(f"{wrong[0]}{more}: checksum mismatch")


class _RecordHandler(ocp.AsyncCheckpointHandler):
  """Handler by which orbax writes and reads record.json.

  Process 0 writes the file in the background, after the checksums of the arrays are computed.
  """

  async def async_save(self, directory, args):
    write = ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args))
    return [write]

  async def _write(self, directory, args) -> None:
    checksums = await asyncio.to_thread(args.checksums)
    if jax.process_index() == 0:
      arrays = {name: [kind, checksums[name]] for name, kind in args.kinds.items()}
      text = _canonical({**args.record, "arrays": arrays})
      path = Path(directory) / _FILE
      path.write_text(f'{{"crc32": {zlib.crc32(text.encode())}, "record":\n{text}}}\n')

  def save(self, directory, args):
    raise ValueError("records are saved together with the arrays, in the background")

  def restore(self, directory, args=None):
    return read_record(Path(directory).parent)


@ocp.args.register_with_handler(_RecordHandler, for_save=True)
@dataclasses.dataclass
class _RecordSave(ocp.args.CheckpointArgs):
  record: dict[str, Any]
  kinds: dict[str, str]
  checksums: Callable[[], dict[str, int]]


@ocp.args.register_with_handler(_RecordHandler, for_restore=True)
@dataclasses.dataclass
class _RecordRestore(ocp.args.CheckpointArgs):
  pass


class _Throttle:
  """Slows the writes of a save: limits the bytes written at one time, and pauses after each write.

  The pause is as long as the write took. The class has the interface of orbax's byte limiters.

  Args:
    limit: largest number of bytes being written at one time; a larger array is written alone.
    unthrottled: event that ends the pauses when it is set.
  """

  def __init__(self, limit: int, unthrottled: threading.Event):
    self._free = self._limit = limit
    self._unthrottled = unthrottled
    self._released = asyncio.Condition()
    self._began: dict[asyncio.Task | None, float] = {}

  async def wait_for_bytes(self, requested_bytes: int) -> None:
    needed = min(requested_bytes, self._limit)
    async with self._released:
      await self._released.wait_for(lambda: self._free >= needed)
      self._free -= needed
    self._began[asyncio.current_task()] = time.monotonic()

  async def release_bytes(self, requested_bytes: int) -> None:
    now = time.monotonic()
    until = now + (now - self._began.pop(asyncio.current_task()))
    while not self._unthrottled.is_set() and (left := until - time.monotonic()) > 0:
      await asyncio.sleep(min(left, 0.05))
    async with self._released:
      self._free += min(requested_bytes, self._limit)
      self._released.notify_all()


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
  """Handler by which orbax writes and reads arrays; its writes are throttled.

  Several devices may hold a copy of the same part of an array. The part is written from only one of
  them, because dividing the write among them (`use_replica_parallel`) would block the caller.

  Args:
    unthrottled: event that ends the throttling when it is set.
  """

  def __init__(self, unthrottled: threading.Event):
    super().__init__(
      use_replica_parallel=False, enable_write_sharding_file=False, array_metadata_store=None
    )
    self._unthrottled = unthrottled
    self._writes: list[Any] = []

  async def serialize(self, values, infos, args=None):
    throttle = _Throttle(IN_FLIGHT, self._unthrottled)
    infos = [info.replace(byte_limiter=throttle) for info in infos]
    self._writes = list(await super().serialize(values, infos, args))
    return self._writes

  def wait_for_writes(self) -> None:
    """Waits until all writes of arrays have ended.

    orbax itself does not wait for them if another part of the save has failed.
    """
    writes, self._writes = self._writes, []
    for write in writes:
      with contextlib.suppress(Exception):  # already raised by the save
        write.result()

  async def deserialize(self, infos, args=None):
    before = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)
    except BaseException:
      # The reads of other arrays continue, and would log errors if their event loop were closed.
      await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
      raise


def _registry(handler: _ArrayHandler) -> Any:
  return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


def _canonical(record: dict[str, Any]) -> str:
  return json.dumps(record, separators=(",", ":"))


class _NotOrbax(logging.Filter):
  """Log filter that removes orbax's lines from absl's log; byolx itself logs what the user needs."""

  def filter(self, record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


_filter = _NotOrbax()


def _quiet_orbax() -> None:
  logging.getLogger("absl").addFilter(_filter)
