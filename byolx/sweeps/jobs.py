"""Runs as processes of their own: several at once, none twice, all of them stopped in good order.

Each holds a lock on its workdir for as long as it lives. So a run that outlives who started it is
not started again beside itself, but waited for.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from byolx.core import text
from byolx.core.config import ConfigError, differences, flatten, from_json
from byolx.runs import results

BYOLX = (sys.executable, "-m", "byolx")
"""What runs; tests put a stand-in here."""

LOG = "log.txt"
LAST_LINES = 12
POLL = 0.1  # seconds
_STOPPED = (75, 130)


@dataclasses.dataclass(frozen=True)
class Run:
  """One call of `byolx` that fills a workdir.

  Args:
    name: for people.
    workdir: of the run, with its log.
    arguments: of `byolx`.
    config: that the workdir must have.
    tests: it is finished only when there are records of test images.
  """

  name: str
  workdir: Path
  arguments: tuple[str, ...]
  config: ConfigDict
  tests: bool = False

  def matches(self) -> bool:
    """Whether the workdir has this config; False where it has none."""
    path = self.workdir / "config.json"
    return path.exists() and not self._changed(path)

  def finished(self) -> bool:
    """Whether there is nothing left to do.

    Raises:
      ConfigError: the workdir holds a run of another config.
    """
    path = self.workdir / "config.json"
    if not path.exists():
      return False
    if changed := self._changed(path):
      raise ConfigError(
        f"{self.workdir} holds a run of another config ({'; '.join(changed)}); choose another "
        "--workdir, or remove that folder"
      )
    if not (self.workdir / "results.json").exists():
      return False
    return not self.tests or any(r["split"] == "test" for r in results.read(self.workdir))

  def _changed(self, path: Path) -> list[str]:
    found = flatten(from_json(path.read_text()))
    return differences(found, flatten(self.config))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The runs that did not get to their end: failed, or stopped so that they can go on."""

  failed: tuple[Run, ...]
  stopped: tuple[Run, ...]


class _Child:
  """A run under way: its process, or the wait for another process that is at it."""

  def __init__(self, run: Run):
    self.run, self.began = run, time.monotonic()
    self.process: subprocess.Popen | None = None
    self._from, self._waits = 0, False
    run.workdir.mkdir(parents=True, exist_ok=True)

  def code(self) -> int | None:
    """The exit code, 0 where nothing was left to do; None as long as it goes on."""
    if self.process:
      return self.process.poll()
    folder = os.open(self.run.workdir, os.O_RDONLY)
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if self.run.finished():
        return 0
      self._start(folder)
    except BlockingIOError:
      if not self._waits:
        self._waits = True
        print(f"{self.run.name}: a process of before is still at it, and is waited for", flush=True)
    finally:
      os.close(folder)
    return None

  def _start(self, lock: int) -> None:
    command = [*BYOLX, *self.run.arguments]
    with (self.run.workdir / LOG).open("ab") as log:
      log.write(f"$ {shlex.join(command)}\n".encode())
      log.flush()
      self._from = log.tell()
      self.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[lock],
        start_new_session=True,  # Ctrl-C comes to the sweep alone, which passes it on
      )

  def terminate(self) -> None:
    if self.process and self.process.poll() is None:
      self.process.terminate()

  def last_lines(self) -> list[str]:
    with (self.run.workdir / LOG).open("rb") as log:
      log.seek(self._from)
      lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LAST_LINES:]


def run_all(
  runs: Sequence[Run], jobs: int, stopping: Callable[[], bool], say: Callable[[Run], str]
) -> Outcome:
  """Runs what is not finished, so many at once, with a line for each that ends.

  Args:
    runs: in the order in which they start.
    jobs: at once.
    stopping: when this turns true, runs are told to stop and save, and waited for.
    say: what a finished run found.

  Raises:
    ConfigError: a workdir holds a run of another config, or what `say` raises.
  """
  waiting = collections.deque(run for run in runs if not run.finished())
  before = len(runs) - len(waiting)
  if before:
    print(f"{before} of {len(runs)} were finished before", flush=True)
  progress = _Progress(len(runs), before, jobs)
  failed, stopped, told = [], [], False
  with _orderly() as running:
    while running or (waiting and not stopping()):
      while waiting and len(running) < jobs and not stopping():
        running.append(_Child(waiting.popleft()))
      if stopping() and not told:
        told = True
        running[:] = [child for child in running if child.process]
        for child in running:
          child.terminate()
      for child in list(running):
        code = child.code()
        if code is None:
          continue
        running.remove(child)
        if code == 0 and child.run.finished():
          progress.line(child, say(child.run), running)
        elif code in _STOPPED or told:
          stopped.append(child.run)
          progress.line(child, "stopped, and goes on by the same command", running)
        else:
          failed.append(child.run)
          progress.line(child, f"failed: {_reason(code)}", running)
          lines = "\n".join(f"  | {line}" for line in child.last_lines())
          print(f"{child.run.name}: {child.run.workdir / LOG} ends\n{lines}", file=sys.stderr)
      time.sleep(POLL if running else 0)
  return Outcome(tuple(failed), tuple(stopped))


@contextlib.contextmanager
def _orderly() -> Iterator[list[_Child]]:
  """A list whose processes have ended when this is left, however it is left."""
  running: list[_Child] = []
  try:
    yield running
  finally:
    for child in running:
      child.terminate()
    for child in running:
      if child.process:
        child.process.wait()


def _reason(code: int) -> str:
  if code == 0:
    return "exit code 0, but no results.json"
  return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class _Progress:
  """Lines on how far it is, and how long it will take by how long it took."""

  def __init__(self, total: int, done: int, jobs: int):
    self._total, self._done, self._jobs = total, done, jobs
    self._seconds: list[float] = []

  def line(self, child: _Child, what: str, running: Sequence[_Child]) -> None:
    now = time.monotonic()
    self._done += 1
    self._seconds.append(now - child.began)
    mean, left = sum(self._seconds) / len(self._seconds), self._total - self._done
    spent = sum(min(mean, now - other.began) for other in running)
    parts = [f"{self._done}/{self._total}", child.run.name, what]
    if left:
      ahead = (mean * left - spent) / min(self._jobs, left)
      parts.append(f"about {text.duration(ahead)} left")
    print("  ".join(parts), flush=True)
