"""Executes the runs of a sweep as parallel processes. A signal stops all of them.

Each process holds a lock on its workdir until it exits. If a sweep is killed, its processes may
continue. Then the next sweep waits for them and does not start the same runs twice.
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
from byolx.core.config import ConfigError, flatten
from byolx.runs import results
from byolx.runs.config import differences, from_json

BYOLX = (sys.executable, "-m", "byolx")
"""Command line that starts `byolx`. Tests replace it."""

LOG = "log.txt"
LAST_LINES = 12
POLL = 0.1  # seconds
_STOPPED = (
  75,
  130,
)  # exit codes of a run that was stopped, by SIGTERM or Ctrl-C, and can be resumed


@dataclasses.dataclass(frozen=True)
class Run:
  """One call of `byolx` that trains or tests in a workdir.

  Args:
    name: name of the run in messages.
    workdir: folder for the results of the run and for its log.
    arguments: command-line arguments of `byolx`.
    config: config of the run. If the workdir already has a config, it must be equal.
    tests: whether the run must write test results. If True, the run is finished only when its
      results.json has results on test images.
  """

  name: str
  workdir: Path
  arguments: tuple[str, ...]
  config: ConfigDict
  tests: bool = False

  def matches(self) -> bool:
    """Returns whether the config in the workdir equals the config of this run.

    The result is False if the workdir has no config.
    """
    path = self.workdir / "config.json"
    return path.exists() and not self._changed(path)

  def finished(self) -> bool:
    """Returns whether the workdir has the results of this run, which is then finished.

    Raises:
      ConfigError: the workdir has a run with another config.
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
    current = flatten(from_json(path.read_text()))
    return differences(current, flatten(self.config))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Runs that did not finish.

  Args:
    failed: runs that ended with an error, or without results.
    stopped: runs that a signal stopped. They can be resumed.
  """

  failed: tuple[Run, ...]
  stopped: tuple[Run, ...]


class _Job:
  """A run in progress.

  The job usually starts a process for the run. If a process of an earlier sweep still executes the
  same run, the workdir is locked. The job then waits until that process ends.
  """

  def __init__(self, run: Run):
    self.run, self.began = run, time.monotonic()
    self.process: subprocess.Popen | None = None
    self._log_start, self._announced = 0, False
    run.workdir.mkdir(parents=True, exist_ok=True)

  def code(self) -> int | None:
    """Returns the exit code of the run, or None while the run has not ended. May start the run.

    While an earlier process locks the workdir, the method starts nothing. The first call without
    such a lock starts the process of the run. If the run is finished by then, the method starts no
    process and returns 0.
    """
    if self.process:
      return self.process.poll()
    folder = os.open(self.run.workdir, os.O_RDONLY)
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if self.run.finished():
        return 0
      self._start(folder)
    except BlockingIOError:
      if not self._announced:
        self._announced = True
        print(
          f"{self.run.name}: waiting for an earlier process, which is still running it", flush=True
        )
    finally:
      os.close(folder)
    return None

  def _start(self, lock: int) -> None:
    command = [*BYOLX, *self.run.arguments]
    with (self.run.workdir / LOG).open("ab") as log:
      log.write(f"$ {shlex.join(command)}\n".encode())
      log.flush()
      self._log_start = log.tell()
      self.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[lock],
        start_new_session=True,  # Ctrl-C reaches only the sweep, which then stops the runs
      )

  def terminate(self) -> None:
    if self.process and self.process.poll() is None:
      self.process.terminate()

  def last_lines(self) -> list[str]:
    with (self.run.workdir / LOG).open("rb") as log:
      log.seek(self._log_start)
      lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LAST_LINES:]


def run_all(
  runs: Sequence[Run], jobs: int, should_stop: Callable[[], bool], describe: Callable[[Run], str]
) -> Outcome:
  """Executes the runs that are not finished, and prints a line when a run ends.

  Args:
    runs: runs, in the order of their start.
    jobs: largest number of runs at the same time.
    should_stop: function that returns True when all runs must stop. Each run then receives SIGTERM,
      saves its state and exits. `run_all` waits until all runs have exited.
    describe: function that returns the results of a finished run as text. `run_all` does not catch its
      errors.

  Returns:
    The runs that failed or were stopped.

  Raises:
    ConfigError: a workdir has a run with another config.
  """
  pending = collections.deque(run for run in runs if not run.finished())
  finished_before = len(runs) - len(pending)
  if finished_before:
    print(f"{finished_before} of {len(runs)} runs are already finished", flush=True)
  progress = _Progress(len(runs), finished_before, jobs)
  failed, stopped, terminated = [], [], False
  with _terminating() as running:
    while running or (pending and not should_stop()):
      while pending and len(running) < jobs and not should_stop():
        running.append(_Job(pending.popleft()))
      if should_stop() and not terminated:
        terminated = True
        running[:] = [job for job in running if job.process]
        for job in running:
          job.terminate()
      for job in list(running):
        code = job.code()
        if code is None:
          continue
        running.remove(job)
        if code == 0 and job.run.finished():
          progress.line(job, describe(job.run), running)
        elif code in _STOPPED or terminated:
          stopped.append(job.run)
          progress.line(job, "stopped; the same command resumes it", running)
        else:
          failed.append(job.run)
          progress.line(job, f"failed: {_reason(code)}", running)
          lines = "\n".join(f"  | {line}" for line in job.last_lines())
          print(f"{job.run.name}: last lines of {job.run.workdir / LOG}\n{lines}", file=sys.stderr)
      time.sleep(POLL if running else 0)
  return Outcome(tuple(failed), tuple(stopped))


@contextlib.contextmanager
def _terminating() -> Iterator[list[_Job]]:
  """Context manager that yields an empty list, to which the caller adds jobs.

  When the `with` block ends, also by an exception, it terminates the processes of all jobs in the
  list and waits until they have exited.
  """
  running: list[_Job] = []
  try:
    yield running
  finally:
    for job in running:
      job.terminate()
    for job in running:
      if job.process:
        job.process.wait()


def _reason(code: int) -> str:
  if code == 0:
    return "exit code 0, but no results.json"
  return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class _Progress:
  """Prints a line for each run that ends, with an estimate of the sweep's remaining time.

  The estimate is based on the mean duration of the runs that have ended.
  """

  def __init__(self, total: int, done: int, jobs: int):
    self._total, self._done, self._jobs = total, done, jobs
    self._seconds: list[float] = []

  def line(self, job: _Job, result: str, running: Sequence[_Job]) -> None:
    now = time.monotonic()
    self._done += 1
    self._seconds.append(now - job.began)
    mean, left = sum(self._seconds) / len(self._seconds), self._total - self._done
    spent = sum(min(mean, now - other.began) for other in running)
    parts = [f"{self._done}/{self._total}", job.run.name, result]
    if left:
      ahead = (mean * left - spent) / min(self._jobs, left)
      parts.append(f"about {text.duration(ahead)} left")
    print("  ".join(parts), flush=True)
