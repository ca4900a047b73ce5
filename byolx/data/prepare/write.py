"""`byolx prepare`: a folder or tar archives become a prepared set (see data.records).

Which input goes into which shard is settled before anything is written, by names and sizes alone,
so the set does not depend on the number of processes. The plan is kept in the set, and a run that
was stopped goes on from the shards that are finished; what comes out is the same to the byte.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import byolx
from byolx.core.config import ConfigError
from byolx.core.text import duration
from byolx.data.prepare import collect
from byolx.data.prepare.collect import Collection, Inputs
from byolx.data.prepare.shards import (
  TEMPORARY,
  Encode,
  Finished,
  Job,
  finish,
  start_worker,
  write_durably,
)
from byolx.data.sources import prepared, prepared_format
from byolx.data.sources.prepared_format import (
  MANIFEST,
  PROGRESS,
  Index,
  IndexFile,
  Manifest,
  StoredSplit,
)
from byolx.data.unreadable import TooManyFailuresError

PLAN = "plan.json"
UNREADABLE = "unreadable.txt"
PROGRESS_SECONDS = 10.0
MAX_SHARDS = 100_000
_MB = 10**6


class DamagedError(OSError):
  """A set that is not as it was written."""


@dataclass(frozen=True)
class Options:
  """What is asked of `prepare`, beside where from and where to.

  Attributes:
    name: of the set; empty for the name of the folder or archive.
    shards: how many for the training split; None to go by `shard_mb`.
    shard_mb: megabytes of input in a shard.
    encode: None to store every file as it is.
    workers: processes; 1 works in this one.
    max_failed_share: of the inputs; with more unreadable ones nothing is published.
  """

  name: str = ""
  shards: int | None = None
  shard_mb: int = 256
  encode: Encode | None = None
  workers: int = 1
  max_failed_share: float = 0.01


def prepare(
  source: Path,
  to: Path,
  options: Options,
  test: Path | None = None,
  test_labels: Path | None = None,
) -> None:
  """Writes the set, or goes on with it where it stopped.

  Raises:
    ConfigError: there is nothing to prepare, or `to` holds something else.
    TooManyFailuresError: too many inputs cannot be read; nothing is published.
    OSError: the set cannot be written; finished shards stay.
  """
  began = time.monotonic()
  try:
    collection = collect.collect(source, test, test_labels)
    cut = _cut_all(collection, options)
  except ValueError as error:
    said = str(error).replace("data.folder is", "--from is").replace(", data.test_share 0.0", "")
    raise ConfigError(said) from error
  name = options.name or source.resolve().name.removesuffix(".tar")
  plan = _plan(name, collection, cut, options.encode)
  with _claimed(to, plan):
    if not (to / MANIFEST).exists():
      finished = _write_shards(to, collection, cut, options)
      _publish(to, name, collection, cut, finished, options.encode)
    for note in (to / PROGRESS).glob("*.json"):
      if note.name != PLAN:
        note.unlink()
  _conclude(to, time.monotonic() - began)


def verify(folder: Path, workers: int, images: bool) -> None:
  """Reads a whole set, and prints what is wrong with it.

  Raises:
    ConfigError: it is not a finished set.
    DamagedError: anything is wrong.
  """
  try:
    manifest = prepared_format.read_manifest(folder)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  files = [shard for split in manifest.splits.values() for shard in split.shards]
  progress = _Progress("verified", len(files), sum(shard.bytes for shard in files))
  problems = prepared.verify(folder, progress.add, images=images, threads=workers)
  for problem in problems:
    print(problem, file=sys.stderr)
  if problems:
    raise DamagedError(f"{folder} is damaged: {_plural(len(problems), 'problem')}, listed above")
  print(f"verified {folder}: {_contents(manifest)}")


# 1. The plan.


def _cut_all(collection: Collection, options: Options) -> dict[str, list[np.ndarray]]:
  """For every split, the inputs of each shard: neighbours, of about as many bytes."""
  if options.shards is None:
    per_shard = options.shard_mb * _MB
  else:
    train = collection.splits["train"]
    if options.shards > len(train):
      raise ValueError(f"--shards={options.shards}: expected at most {len(train)}, one per image")
    per_shard = int((train.sizes + 1).sum()) / options.shards
  cut = {}
  for split, of_split in collection.splits.items():
    total = int((of_split.sizes + 1).sum())  # one more, so that empty files count for something
    count = min(max(1, math.ceil(total / per_shard - 1e-9)), len(of_split))
    if count >= MAX_SHARDS:
      raise ValueError(
        f"{count} shards for {split}; expected less than {MAX_SHARDS}: increase --shard_mb"
      )
    cut[split] = _cut(of_split.sizes + 1, count)
  return cut


def _cut(sizes: np.ndarray, count: int) -> list[np.ndarray]:
  """Numbers of neighbours, in `count` parts that are not empty."""
  reached = np.cumsum(sizes)
  starts = [0]
  for part in range(1, count):
    start = int(np.searchsorted(reached, reached[-1] * part / count))
    starts.append(min(max(start, starts[-1] + 1), len(sizes) - count + part))
  return np.split(np.arange(len(sizes)), starts[1:])


def _plan(
  name: str, collection: Collection, cut: dict[str, list[np.ndarray]], encode: Encode | None
) -> dict[str, Any]:
  """What makes the set what it is; two runs with the same plan write the same bytes."""
  left_out = "\n".join(collection.left_out).encode("utf-8", "surrogateescape")
  return {
    "format": prepared_format.FORMAT,
    "name": name,
    "encode": encode.describe() if encode else None,
    "classes": len(collection.classes),
    "what was left out": hashlib.sha256(left_out).hexdigest(),
    "splits": {
      split: {
        "images": len(of_split),
        "bytes": int(of_split.sizes.sum()),
        "names, sizes and labels": _fingerprint(of_split, collection.classes),
        "shards": len(cut[split]),
      }
      for split, of_split in collection.splits.items()
    },
  }


def _fingerprint(of_split: Inputs, classes: tuple[str, ...]) -> str:
  digest = hashlib.sha256(json.dumps(classes).encode())
  digest.update(of_split.names.buffer)
  for values in (of_split.names.ends, of_split.sizes, of_split.labels):
    digest.update(np.ascontiguousarray(values, "<i8").tobytes())
  return digest.hexdigest()


def _differences(found: Any, given: Any, where: str = "") -> list[str]:
  """What differs between two plans, as `splits.train.images: 10 -> 11`."""
  if isinstance(found, dict) and isinstance(given, dict):
    keys = dict.fromkeys([*found, *given])
    parts = [_differences(found.get(k), given.get(k), f"{where}.{k}".lstrip(".")) for k in keys]
    return [line for part in parts for line in part]
  if found == given:
    return []
  is_digest = isinstance(found, str) and len(found) == hashlib.sha256().digest_size * 2
  return [f"{where} changed" if is_digest else f"{where}: {found} -> {given}"]


@contextlib.contextmanager
def _claimed(to: Path, plan: dict[str, Any]) -> Iterator[None]:
  """Makes the folder this plan's, for this process alone, or refuses another plan's."""
  path = to / PROGRESS / PLAN
  if to.exists() and not to.is_dir():
    raise ConfigError(f"--to={to} is not a folder; expected a new or an empty one")
  if not path.exists() and to.exists() and any(entry.name != PROGRESS for entry in to.iterdir()):
    raise ConfigError(f"--to={to} has other files in it; expected a new or an empty folder")
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(f"--to={to} is being written by another process") from error
    for temporary in path.parent.glob(f"*{TEMPORARY}"):  # of a run that was killed
      temporary.unlink()
    if path.exists():
      try:
        found = json.loads(path.read_text())
      except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; expected a new --to") from error
      if changed := _differences(found, plan):
        raise ConfigError(
          f"--to={to} holds a set of another plan ({'; '.join(changed)}); choose another --to, or"
          " undo the change"
        )
    else:
      write_durably(path, (json.dumps(plan, indent=1) + "\n").encode())
    yield
  finally:
    os.close(folder)


# 2. Shards.


def _write_shards(
  to: Path, collection: Collection, cut: dict[str, list[np.ndarray]], options: Options
) -> dict[str, Finished]:
  """Finishes all shards, several at a time; returns them by file."""
  jobs = [
    Job(str(to), _shard_file(split, number, len(parts)), of_split.take(part), options.encode)
    for split, of_split, parts in _zipped(collection, cut)
    for number, part in enumerate(parts)
  ]
  sizes = {job.file: int(job.inputs.sizes.sum()) for job in jobs}
  images = sum(len(of_split) for of_split in collection.splits.values())
  most = options.max_failed_share * (images + len(collection.left_out))
  print(f"{images:,} images, {_size(sum(sizes.values()))}, into {len(jobs)} shards", flush=True)
  progress = _Progress("prepared", len(jobs), sum(sizes.values()))
  finished, left_out = {}, len(collection.left_out)
  try:
    for done in _finish_all(jobs, options.workers):
      finished[done.shard.file] = done
      left_out += len(done.unreadable)
      if left_out > most:
        break
      progress.add(len(done.kept), sizes[done.shard.file])
  except OSError as error:
    raise OSError(f"{to}: {error}; finished shards stay, the same command goes on") from error
  unreadable = [
    line for job in jobs if job.file in finished for line in finished[job.file].unreadable
  ]
  _write_list(to / UNREADABLE, [*collection.left_out, *unreadable])
  if left_out > most:
    raise TooManyFailuresError(
      f"{left_out} inputs of {images} were left out so far, see {to / UNREADABLE}; expected at most"
      f" a share of --max_failed_share={options.max_failed_share}"
    )
  return finished


def _finish_all(jobs: list[Job], workers: int) -> Iterator[Finished]:
  """Finished shards in any order; where it ends early, shards that were begun are finished."""
  if workers == 1 or len(jobs) == 1:
    yield from map(finish, jobs)
    return
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=start_worker)
  try:
    for future in as_completed([pool.submit(finish, job) for job in jobs]):
      yield future.result()
  except BrokenProcessPool as error:
    raise OSError("a worker process was killed, as it happens where memory is short") from error
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _shard_file(split: str, number: int, count: int) -> str:
  return f"{split}-{number:05d}-of-{count:05d}.array_record"


def _zipped(collection: Collection, cut: dict[str, list[np.ndarray]]):
  return [(split, of_split, cut[split]) for split, of_split in collection.splits.items()]


# 3. Publishing.


def _publish(
  to: Path,
  name: str,
  collection: Collection,
  cut: dict[str, list[np.ndarray]],
  finished: dict[str, Finished],
  encode: Encode | None,
) -> None:
  """Writes the indices, and then `dataset.json`, which makes a set of the shards."""
  splits = {}
  for split, of_split, parts in _zipped(collection, cut):
    files = [finished[_shard_file(split, i, len(parts))] for i in range(len(parts))]
    kept = np.concatenate([part[done.kept] for part, done in zip(parts, files)])
    if not len(kept):
      raise TooManyFailuresError(
        f"no image of the {split} split can be read, see {to / UNREADABLE}"
      )
    crc32 = np.array([value for done in files for value in done.crc32], np.uint32)
    index = Index(of_split.labels[kept], crc32, of_split.names.take(kept)).to_bytes()
    file = f"{split}.index.npz"
    write_durably(to / file, index)
    digest = hashlib.sha256(index).hexdigest()
    splits[split] = StoredSplit(
      len(kept), IndexFile(file, len(index), digest), tuple(done.shard for done in files)
    )
  described = encode.describe() if encode else None
  manifest = Manifest(name, byolx.__version__, described, collection.classes, splits)
  write_durably(to / MANIFEST, manifest.to_json().encode())


def _write_list(path: Path, lines: list[str]) -> None:
  text = "".join(f"{line}\n" for line in lines)
  write_durably(path, text.encode("utf-8", "surrogateescape"))


# 4. Reports.


class _Progress:
  """A line now and then: shards, rates, remaining time."""

  def __init__(self, verb: str, files: int, size: int):
    self._verb, self._files, self._size = verb, files, size
    self._began = self._printed = time.monotonic()
    self._done = self._records = self._bytes = 0
    self._lock = threading.Lock()

  def add(self, count: int, size: int) -> None:
    """One more shard, of so many records made from (or read as) so many bytes."""
    with self._lock:
      self._done += 1
      self._records += count
      self._bytes += size
      now = time.monotonic()
      if now - self._printed < PROGRESS_SECONDS and self._done < self._files:
        return
      self._printed = now
      took = max(now - self._began, 1e-9)
      left = took * (self._size - self._bytes) / max(self._bytes, 1)
      parts = [
        f"{self._verb} shard {self._done:>{len(str(self._files))}}/{self._files}",
        f"{self._records:,} records",
        f"{self._records / took:.0f} records/s",
        f"{self._bytes / took / _MB:.1f} MB/s",
        f"{duration(left)} left",
      ]
      print("  ".join(parts), file=sys.stderr, flush=True)


def _conclude(to: Path, seconds: float) -> None:
  try:
    manifest = prepared_format.read_manifest(to)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  print(f"{to} is prepared: {_contents(manifest)}; {duration(seconds)}")
  with open(to / UNREADABLE, "rb") as file:
    left_out = sum(1 for _ in file)
  if left_out:
    print(f"{_plural(left_out, 'input')} left out: see {to / UNREADABLE}")


def _contents(manifest: Manifest) -> str:
  """`train 1,281,167 records in 545 shards, 137.9 GB; test ...`."""
  parts = [
    f"{split} {_plural(stored.records, 'record')} in {_plural(len(stored.shards), 'shard')}, "
    + _size(sum(shard.bytes for shard in stored.shards))
    for split, stored in manifest.splits.items()
  ]
  return "; ".join(parts)


def _plural(count: int, noun: str) -> str:
  return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(size: int) -> str:
  return f"{size / 10**9:.1f} GB" if size >= 10**9 else f"{size / _MB:.1f} MB"
