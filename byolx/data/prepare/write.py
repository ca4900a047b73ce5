"""Implements `byolx prepare`, which converts a folder or tar archives of images to a prepared set.

A prepared set has a few large files (shards) with random access. Before anything is written,
each image is assigned to a shard, by the order and the sizes of the image files. So the set does not
depend on the number of processes. A plan is stored in the set, and describes all that determines the
result. If a run is stopped, the same command continues after the finished shards. The set is then the
same, byte for byte, as after a run without a stop.
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

from byolx.core.config import ConfigError
from byolx.core.text import duration
from byolx.core.version import VERSION
from byolx.data.prepare import collect
from byolx.data.prepare.collect import Collection, Inputs
from byolx.data.prepare.shards import (
  TEMPORARY,
  Encode,
  Finished,
  Job,
  start_worker,
  write_durably,
  write_shard,
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
  """Error: files of a prepared data set do not match their checksums."""


@dataclass(frozen=True)
class Options:
  """Settings of the function `prepare`, which writes a prepared set.

  Attributes:
    name: name of the set; '' for the name of the folder or archive of images.
    shards: number of shards (files of records) of the training split; None to derive the number from
      `shard_mb`.
    shard_mb: approximate size of the image files of one shard, in megabytes (10**6 bytes).
    encode: settings for reducing large images; None to store each file unchanged.
    workers: number of worker processes; with 1, the calling process does all the work itself.
    max_failed_share: largest share of images that may be left out as unreadable, 0 to 1. If more are
      left out, the set is not finished.
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
  """Converts images to a prepared set (a few large files), or continues an unfinished set.

  Args:
    source: path of a folder or tar archive with the training images, or with both splits.
    to: path of the set: a new or empty folder, or the set of an earlier run with the same images and
      options.
    options: settings of the set.
    test: path of a folder or tar archive with the test images; None if `source` has them, or if there is
      no test split.
    test_labels: path of a file with lines `file-name class-name` for the test images; None if their
      folders give their classes.

  Raises:
    ConfigError: there is no image, or `to` has other contents.
    TooManyFailuresError: too many images cannot be read; the set stays unfinished.
    OSError: the set cannot be written; the finished shards remain.
  """
  start = time.monotonic()
  try:
    collection = collect.collect(source, test, test_labels)
    cut = _cut_all(collection, options)
  except ValueError as error:
    reason = str(error).replace("data.folder is", "--from is")
    raise ConfigError(reason.replace(", data.test_share 0.0", "")) from error
  name = options.name or source.resolve().name.removesuffix(".tar")
  plan = _plan(name, collection, cut, options.encode)
  with _claimed(to, plan):
    if not (to / MANIFEST).exists():
      finished = _write_shards(to, collection, cut, options)
      _publish(to, name, collection, cut, finished, options.encode)
    for progress_file in (to / PROGRESS).glob("*.json"):
      if progress_file.name != PLAN:
        progress_file.unlink()
  _print_summary(to, time.monotonic() - start)


def verify(folder: Path, workers: int, images: bool) -> None:
  """Checks all files of a prepared data set against their checksums, and prints problems to stderr.

  Args:
    folder: path of the prepared set.
    workers: number of threads that read in parallel.
    images: whether to decode the image in each record as well.

  Raises:
    ConfigError: the folder has no finished set.
    DamagedError: the set has at least one problem.
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
  """Assigns the images of each split to shards (large files) of about equal size in bytes.

  Returns:
    Dict from the name of each split to a list. The list has one array per shard: the indices of the
    images in the shard, which are consecutive.

  Raises:
    ValueError: there would be more shards than images, or too many shards.
  """
  if options.shards is None:
    per_shard = options.shard_mb * _MB
  else:
    train = collection.splits["train"]
    if options.shards > len(train):
      raise ValueError(f"--shards={options.shards}: expected at most {len(train)}, one per image")
    per_shard = int((train.sizes + 1).sum()) / options.shards
  cut = {}
  for split, inputs in collection.splits.items():
    total = int((inputs.sizes + 1).sum())  # + 1, so that empty files count as well
    count = min(max(1, math.ceil(total / per_shard - 1e-9)), len(inputs))
    if count >= MAX_SHARDS:
      raise ValueError(
        f"{count} shards for {split}; expected fewer than {MAX_SHARDS}: increase --shard_mb"
      )
    cut[split] = _cut(inputs.sizes + 1, count)
  return cut


def _cut(sizes: np.ndarray, count: int) -> list[np.ndarray]:
  """Divides the indices of `sizes` into `count` consecutive, nonempty parts of about equal total size."""
  ends = np.cumsum(sizes)
  starts = [0]
  for part in range(1, count):
    start = int(np.searchsorted(ends, ends[-1] * part / count))
    starts.append(min(max(start, starts[-1] + 1), len(sizes) - count + part))
  return np.split(np.arange(len(sizes)), starts[1:])


def _plan(
  name: str, collection: Collection, cut: dict[str, list[np.ndarray]], encode: Encode | None
) -> dict[str, Any]:
  """Returns the plan, which describes all that determines the set.

  Sets with equal plans are equal, byte for byte.
  """
  left_out = "\n".join(collection.left_out).encode("utf-8", "surrogateescape")
  return {
    "format": prepared_format.FORMAT,
    "name": name,
    "encode": encode.describe() if encode else None,
    "classes": len(collection.classes),
    "what was left out": hashlib.sha256(left_out).hexdigest(),
    "splits": {
      split: {
        "images": len(inputs),
        "bytes": int(inputs.sizes.sum()),
        "names, sizes and labels": _fingerprint(inputs, collection.classes),
        "shards": len(cut[split]),
      }
      for split, inputs in collection.splits.items()
    },
  }


def _fingerprint(inputs: Inputs, classes: tuple[str, ...]) -> str:
  sha256 = hashlib.sha256(json.dumps(classes).encode())
  sha256.update(inputs.names.buffer)
  for values in (inputs.names.ends, inputs.sizes, inputs.labels):
    sha256.update(np.ascontiguousarray(values, "<i8").tobytes())
  return sha256.hexdigest()


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
  """Returns the differences between two plans as lines, such as `splits.train.images: 10 -> 11`."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = dict.fromkeys([*old, *new])
    parts = [_differences(old.get(k), new.get(k), f"{key}.{k}".lstrip(".")) for k in keys]
    return [line for part in parts for line in part]
  if old == new:
    return []
  is_sha256 = isinstance(old, str) and len(old) == hashlib.sha256().digest_size * 2
  return [f"{key} changed" if is_sha256 else f"{key}: {old} -> {new}"]


@contextlib.contextmanager
def _claimed(to: Path, plan: dict[str, Any]) -> Iterator[None]:
  """Locks the folder of a prepared set while the context is open, and stores the plan there.

  Args:
    to: path of the folder.
    plan: description of all that determines the set.

  Raises:
    ConfigError: the folder has other files or another plan, or another process is writing to it.
  """
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
        old = json.loads(path.read_text())
      except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; expected a new --to") from error
      if changed := _differences(old, plan):
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
  """Writes all shards (large files of images) in parallel.

  Then writes the list of the images that were left out.

  Args:
    to: path of the set.
    collection: images of the splits.
    cut: indices of the images of each shard, by split.
    options: settings of the set.

  Returns:
    Description of each written shard, by its file name.

  Raises:
    TooManyFailuresError: too many images were left out.
    OSError: a shard cannot be written.
  """
  jobs = [
    Job(str(to), _shard_file(split, number, len(parts)), inputs.take(part), options.encode)
    for split, inputs, parts in _zipped(collection, cut)
    for number, part in enumerate(parts)
  ]
  sizes = {job.file: int(job.inputs.sizes.sum()) for job in jobs}
  images = sum(len(inputs) for inputs in collection.splits.values())
  max_left_out = options.max_failed_share * (images + len(collection.left_out))
  print(f"{images:,} images, {_size(sum(sizes.values()))}, into {len(jobs)} shards", flush=True)
  progress = _Progress("prepared", len(jobs), sum(sizes.values()))
  finished, left_out = {}, len(collection.left_out)
  try:
    for done in _write_in_parallel(jobs, options.workers):
      finished[done.shard.file] = done
      left_out += len(done.unreadable)
      if left_out > max_left_out:
        break
      progress.add(len(done.kept), sizes[done.shard.file])
  except OSError as error:
    raise OSError(
      f"{to}: {error}; finished shards remain; run the same command again to continue"
    ) from error
  unreadable = [
    line for job in jobs if job.file in finished for line in finished[job.file].unreadable
  ]
  _write_list(to / UNREADABLE, [*collection.left_out, *unreadable])
  if left_out > max_left_out:
    raise TooManyFailuresError(
      f"{left_out} inputs of {images} were left out so far, see {to / UNREADABLE}; expected at most"
      f" a share of --max_failed_share={options.max_failed_share}"
    )
  return finished


def _write_in_parallel(jobs: list[Job], workers: int) -> Iterator[Finished]:
  """Writes shards (large files of images), and yields a description of each finished shard.

  The shards are written in parallel if `workers` is above 1. If the iterator is closed early, the
  shards that were already started are completed.

  Raises:
    OSError: a shard cannot be written, or a worker process was killed.
  """
  if workers == 1 or len(jobs) == 1:
    yield from map(write_shard, jobs)
    return
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=start_worker)
  try:
    for future in as_completed([pool.submit(write_shard, job) for job in jobs]):
      yield future.result()
  except BrokenProcessPool as error:
    raise OSError("a worker process was killed, possibly for lack of memory") from error
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _shard_file(split: str, number: int, count: int) -> str:
  return f"{split}-{number:05d}-of-{count:05d}.array_record"


def _zipped(collection: Collection, cut: dict[str, list[np.ndarray]]):
  return [(split, inputs, cut[split]) for split, inputs in collection.splits.items()]


# 3. Publishing.


def _publish(
  to: Path,
  name: str,
  collection: Collection,
  cut: dict[str, list[np.ndarray]],
  finished: dict[str, Finished],
  encode: Encode | None,
) -> None:
  """Writes the index file of each split. Then writes `dataset.json`, which marks the set as finished.

  Args:
    to: path of the set.
    name: name of the set.
    collection: images of the splits.
    cut: indices of the images of each shard, by split.
    finished: description of each written shard, by its file name.
    encode: settings for reducing large images; None if each file was stored unchanged.

  Raises:
    TooManyFailuresError: no image of a split can be read.
  """
  splits = {}
  for split, inputs, parts in _zipped(collection, cut):
    files = [finished[_shard_file(split, i, len(parts))] for i in range(len(parts))]
    kept = np.concatenate([part[done.kept] for part, done in zip(parts, files)])
    if not len(kept):
      raise TooManyFailuresError(
        f"no image of the {split} split can be read, see {to / UNREADABLE}"
      )
    crc32 = np.array([value for done in files for value in done.crc32], np.uint32)
    index = Index(inputs.labels[kept], crc32, inputs.names.take(kept)).to_bytes()
    file = f"{split}.index.npz"
    write_durably(to / file, index)
    sha256 = hashlib.sha256(index).hexdigest()
    splits[split] = StoredSplit(
      len(kept), IndexFile(file, len(index), sha256), tuple(done.shard for done in files)
    )
  described = encode.describe() if encode else None
  manifest = Manifest(name, VERSION, described, collection.classes, splits)
  write_durably(to / MANIFEST, manifest.to_json().encode())


def _write_list(path: Path, lines: list[str]) -> None:
  text = "".join(f"{line}\n" for line in lines)
  write_durably(path, text.encode("utf-8", "surrogateescape"))


# 4. Reports.


class _Progress:
  """Prints progress lines to stderr: finished shards, rates and remaining time.

  Args:
    verb: first word of a line, such as "prepared".
    files: number of all shards.
    size: size of all shards in bytes.
  """

  def __init__(self, verb: str, files: int, size: int):
    self._verb, self._files, self._size = verb, files, size
    self._start = self._printed = time.monotonic()
    self._done = self._records = self._bytes = 0
    self._lock = threading.Lock()

  def add(self, count: int, size: int) -> None:
    """Counts a finished shard of `count` records and `size` bytes, and prints the progress.

    A line is printed if the last one is at least ten seconds old, or if this was the last shard.
    """
    with self._lock:
      self._done += 1
      self._records += count
      self._bytes += size
      now = time.monotonic()
      if now - self._printed < PROGRESS_SECONDS and self._done < self._files:
        return
      self._printed = now
      elapsed = max(now - self._start, 1e-9)
      left = elapsed * (self._size - self._bytes) / max(self._bytes, 1)
      parts = [
        f"{self._verb} shard {self._done:>{len(str(self._files))}}/{self._files}",
        f"{self._records:,} records",
        f"{self._records / elapsed:.0f} records/s",
        f"{self._bytes / elapsed / _MB:.1f} MB/s",
        f"{duration(left)} left",
      ]
      print("  ".join(parts), file=sys.stderr, flush=True)


def _print_summary(to: Path, seconds: float) -> None:
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
  """Returns a line with the contents of a set: `train 96 records in 4 shards, 2.1 MB; test ...`."""
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
