"""One checkpoint on disk: what is in its folder, how it is written in the background, and read.

    STEP/state/    every array under its dotted name, by orbax
    STEP/record/   record.json: format, step, time, data position, facts, metrics, and the type,
                   shape and digest of every array; with a checksum of itself

A folder that is being written has another name and gets its own when all of it is there. A save
shares the machine with training: arrays are written a few at a time, with rests, until somebody
waits for it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
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
"""Of the checkpoints that are written; raised when older code could not read them."""

TEMPORARY = ".orbax-checkpoint-tmp"
"""In the name of a folder that is being written, or was when its process ended."""

IN_FLIGHT = 2**26
"""Bytes being written or read at once, or two of the largest array."""

CHUNK = 2**25
"""Bytes of an array that are stored together, and read even if a device needs a part of them."""

_FILE = "record.json"
_LINE = 300
_SYSTEM_CODE = re.compile(r"os_error_code=\W*(\d+)")  # tensorstore's, at the end of long messages


class CheckpointError(RuntimeError):
  """No usable checkpoint, or one that must not be used, or one that could not be saved."""


class DamagedError(CheckpointError):
  """A checkpoint of which something is missing or is not as it was written."""


def named(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by their paths, dotted; `value` inside an nnx variable is left out."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  found = {".".join(_names(path)): leaf for path, leaf in leaves}
  if len(found) < len(leaves):
    raise ValueError(f"{len(leaves)} arrays have only {len(found)} different names")
  return found


def _names(path: tuple[Any, ...]) -> list[str]:
  names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
  return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def kind(array: Any) -> str:
  """`float32[8, 10]` and the like."""
  return f"{array.dtype}{list(array.shape)}"


def shape_of(kind: str) -> tuple[int, ...]:
  """The shape that a kind names."""
  return tuple(int(size) for size in kind.partition("[")[2].rstrip("]").split(",") if size)


class Writer:
  """Saves checkpoints in the background, one at a time."""

  def __init__(self):
    _quiet_orbax()
    self._hurry = threading.Event()
    self._arrays = _ArrayHandler(self._hurry)
    arrays = ocp.PyTreeCheckpointHandler(
      use_compression=False,  # of weights it saves 8 % of the bytes, and costs twice the work
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
    digests: Callable[[], dict[str, int]],
  ) -> None:
    """Starts a save; the arrays may be donated when it returns.

    Args:
      folder: of the checkpoint.
      arrays: by name.
      record: what is to be known of them; their kinds and digests are added.
      digests: waits for the digests, in the background.
    """
    self._hurry.clear()
    chunks = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=CHUNK))
    kinds = {name: kind(array) for name, array in arrays.items()}
    self._checkpointer.save(
      folder.absolute(),
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays), save_args=chunks),
        record=_RecordSave(record, kinds, digests),
      ),
    )

  def hurry(self) -> None:
    """Somebody waits: no rests until the next save."""
    self._hurry.set()

  def wait(self) -> None:
    """Waits for the save under way and raises what it raised; then nothing of it goes on."""
    try:
      self._checkpointer.wait_until_finished()
    finally:
      self._arrays.settle()

  def close(self) -> None:
    """Waits as well; nothing can be saved afterwards."""
    self._checkpointer.close()


def read_record(folder: Path) -> dict[str, Any]:
  """What a checkpoint says about itself: `format step time data meta metrics arrays`.

  Raises:
    DamagedError: it is missing or not as it was written.
    CheckpointError: it is of a newer format, or must not be read.
  """
  path = folder / "record" / _FILE
  try:
    whole = json.loads(path.read_bytes())
    record, crc = whole["record"], whole["crc32"]
  except FileNotFoundError:
    raise DamagedError(f"{path.relative_to(folder)} is missing") from None
  except PermissionError as error:
    raise CheckpointError(f"{path}: {error.strerror}") from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DamagedError(f"{path.relative_to(folder)}: {one_line(error)}") from None
  if zlib.crc32(_canonical(record).encode()) != crc:
    raise DamagedError(f"{path.relative_to(folder)} is not as it was written (crc32)")
  if record["format"] > FORMAT:
    raise CheckpointError(
      f"{folder} is of format {record['format']}; this version reads up to format {FORMAT}"
    )
  return record


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Some arrays of a checkpoint, placed as `wanted` says; no other array is read.

  Raises:
    DamagedError: one of them cannot be read, or has another type or shape.
    CheckpointError: the files must not be read.
  """
  _quiet_orbax()
  largest = max(array.size * array.dtype.itemsize for array in wanted.values())
  handler = ocp.PyTreeCheckpointHandler(
    restore_concurrent_gb=max(IN_FLIGHT, 2 * largest + 1) / 10**9,
    type_handler_registry=_registry(_ArrayHandler(threading.Event())),
  )
  places = {
    name: ocp.ArrayRestoreArgs(sharding=array.sharding, strict=True)
    for name, array in wanted.items()
  }
  restore = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=places, partial_restore=True)
  try:
    found = handler.restore((folder / "state").absolute(), args=restore)
    found = jax.block_until_ready({name: found[name] for name in wanted})
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # orbax raises whatever its libraries do, and plain Exception
    line = one_line(error)
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in line:
      raise CheckpointError(f"{folder}: {line}") from None
    raise DamagedError(f"its arrays cannot be read: {line}") from None
  for name, array in wanted.items():
    if kind(found[name]) != kind(array):
      raise DamagedError(f"{name} is {kind(found[name])}, expected {kind(array)}")
  return found


def check_digests(record: dict[str, Any], found: Mapping[str, int]) -> None:
  """Raises DamagedError unless these arrays' digests are those of the record."""
  wrong = [name for name, value in found.items() if record["arrays"][name][1] != value]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise DamagedError(f"{wrong[0]}{more}: not the numbers that were saved")


class _RecordHandler(ocp.AsyncCheckpointHandler):
  """Writes the record when the digests are there, from the first process."""

  async def async_save(self, directory, args):
    write = ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args))
    return [write]

  async def _write(self, directory, args) -> None:
    digests = await asyncio.to_thread(args.digests)
    if jax.process_index() == 0:
      arrays = {name: [kind, digests[name]] for name, kind in args.kinds.items()}
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
  digests: Callable[[], dict[str, int]]


@ocp.args.register_with_handler(_RecordHandler, for_restore=True)
@dataclasses.dataclass
class _RecordRestore(ocp.args.CheckpointArgs):
  pass


class _Pace:
  """Lets a few bytes be written at once, and after each write rests for as long as it took."""

  def __init__(self, most: int, hurry: threading.Event):
    self._free = self._most = most
    self._hurry = hurry
    self._room = asyncio.Condition()
    self._began: dict[asyncio.Task | None, float] = {}

  async def wait_for_bytes(self, requested_bytes: int) -> None:
    wanted = min(requested_bytes, self._most)
    async with self._room:
      await self._room.wait_for(lambda: self._free >= wanted)
      self._free -= wanted
    self._began[asyncio.current_task()] = time.monotonic()

  async def release_bytes(self, requested_bytes: int) -> None:
    now = time.monotonic()
    until = now + (now - self._began.pop(asyncio.current_task()))
    while not self._hurry.is_set() and (left := until - time.monotonic()) > 0:
      await asyncio.sleep(min(left, 0.05))
    async with self._room:
      self._free += min(requested_bytes, self._most)
      self._room.notify_all()


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
  """Writes arrays at a pace, from one copy of each; cutting copies up would keep the caller waiting."""

  def __init__(self, hurry: threading.Event):
    super().__init__(
      use_replica_parallel=False, enable_write_sharding_file=False, array_metadata_store=None
    )
    self._hurry = hurry
    self._writes: list[Any] = []

  async def serialize(self, values, infos, args=None):
    pace = _Pace(IN_FLIGHT, self._hurry)
    infos = [info.replace(byte_limiter=pace) for info in infos]
    self._writes = list(await super().serialize(values, infos, args))
    return self._writes

  def settle(self) -> None:
    """Waits until nothing is being written; a save that failed elsewhere does not wait for that."""
    writes, self._writes = self._writes, []
    for write in writes:
      with contextlib.suppress(Exception):  # has been raised by the save
        write.result()

  async def deserialize(self, infos, args=None):
    before = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)
    except BaseException:
      # The reads of other arrays go on, and would complain if their loop were closed meanwhile.
      await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
      raise


def _registry(handler: _ArrayHandler) -> Any:
  return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


def _canonical(record: dict[str, Any]) -> str:
  return json.dumps(record, separators=(",", ":"))


class _NotOrbax(logging.Filter):
  """Leaves orbax's lines out of absl's log: what a reader needs, the run says."""

  def filter(self, record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


_filter = _NotOrbax()


def _quiet_orbax() -> None:
  logging.getLogger("absl").addFilter(_filter)
