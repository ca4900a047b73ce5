"""A run on a TPU, from nothing to its end: bring up, install, start, follow, again after preemptions."""

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tpu_commands
import tpu_scripts
from jobs import FAILED, STOPPED, USAGE, Job
from tpu_commands import ABSENT, BROKEN_STATES, READY, STOPPED_STATES, Described
from tpu_plan import Plan


class LaunchError(Exception):
  """What cannot go on: what happened, and the next action."""

  def __init__(self, happened: str, next_action: str, code: int = FAILED):
    super().__init__(f"{happened}; next: {next_action}")
    self.code = code


class Answer(NamedTuple):
  """Of a command: exit code, stdout and stderr."""

  code: int
  out: str
  error: str


def call(argv: Sequence[str]) -> Answer:
  """Runs a command to its end."""
  done = subprocess.run(
    argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
  )
  return Answer(done.returncode, done.stdout, done.stderr)


def stream(argv: Sequence[str], hear: Callable[[bytes], None]) -> Answer:
  """Runs a command and hands over its lines of stdout as they come."""
  with (
    tempfile.TemporaryFile() as errors,
    subprocess.Popen(
      argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
    ) as process,
  ):
    try:
      for line in process.stdout or ():
        hear(line)
    except BaseException:
      process.terminate()
      raise
    code = process.wait()
    errors.seek(0)
    return Answer(code, "", errors.read().decode(errors="replace"))


class Launcher:
  """Runs a plan.

  Args:
    plan: what and how.
    sleep: waits for so many seconds.
    say: tells the user one line.
  """

  def __init__(
    self,
    plan: Plan,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
  ):
    self._plan, self._tpu = plan, plan.tpu
    self._sleep, self._say = sleep, say
    self._ours = self._created = self._started = False
    self._replaced = 0
    self._log = Log()
    self._said = ""

  def run(self) -> int:
    """All jobs, one after another; deletes the TPU at the end; returns an exit code."""
    try:
      for job in self._plan.jobs:
        code = self._run(job)
        if code:
          break
      else:
        code = 0
    except LaunchError:
      # What this launcher asked for in vain costs money for nothing; a run that goes on does not.
      if self._created and not self._started and not self._plan.keep_on_failure:
        self._abandon()
      raise
    self._conclude(failed=bool(code))
    return code

  def stop(self) -> int:
    """Asks all jobs to save and to end, waits for that, and deletes the TPU."""
    if self._state().state == READY:
      for job in self._plan.jobs:
        self._must("stopping the run", self._plan.stop(job))
        self._must("waiting for the run to end", self._plan.settle(job))
    self._conclude(failed=False)
    return 0

  def still_there(self) -> str:
    """How to delete the TPU by hand."""
    return shlex.join(self._tpu.delete_queued() if self._tpu.queued else self._tpu.delete())

  def _run(self, job: Job) -> int:
    restarts = 0
    self._log = Log()
    while True:
      self._bring_up()
      try:
        self._prepare(job, again=restarts > 0)
      except LaunchError as error:
        if error.code == USAGE or self._state().state == READY:
          raise
        end = None
      else:
        end = self._follow(job)
      if end == 0:
        self._say(f"{self._plan.name(job)}: done; results are in {job.workdir}")
        return 0
      if end not in (STOPPED, None):
        self._explain(job, end)
        return end
      restarts += 1
      if restarts > self._plan.max_restarts:
        raise LaunchError(
          f"{restarts} stops of {self._plan.name(job)}, more than --max_restarts allows",
          "the same command goes on where it stopped",
          STOPPED,
        )
      self._say(f"restart {restarts} of at most {self._plan.max_restarts}")

  def _prepare(self, job: Job, again: bool) -> None:
    """Installs and starts; where that was done, it finds so."""
    for command in self._plan.install():
      self._must("installing", command)
    if again:
      self._must("waiting for the last run to end", self._plan.settle(job))
    self._start(job)
    self._started = True

  def _bring_up(self) -> None:
    """Until the TPU is ready: waits for it, asks for it, deletes it when it was taken away."""
    asked = False
    while True:
      found = self._state()
      if found.state == READY:
        self._check_type(found)
        return
      if found.state == ABSENT:
        self._tell(f"asking for {self._tpu.accelerator_type} {self._tpu.name}")
        self._create()
        asked = True
      elif found.state in STOPPED_STATES:
        self._must("starting the TPU", self._tpu.boot())
      elif found.state in BROKEN_STATES:
        self._replace(found, asked)
        continue
      else:
        self._tell(f"{self._tpu.name} is {found.state}: waiting")
      self._sleep(self._plan.poll)

  def _state(self) -> Described:
    """Of the TPU; while there is none, of the queued resource that will make it."""
    node = self._describe(self._tpu.describe())
    self._ours |= node.ours
    if not self._tpu.queued or node.state == READY:
      return node
    queue = self._describe(self._tpu.describe_queued())
    self._ours |= queue.ours
    if queue.state == "ACTIVE" and node.state == ABSENT:
      # It may have come between the two looks. What was given and is not there was taken away.
      node = self._describe(self._tpu.describe())
      return queue._replace(state="TERMINATED") if node.state == ABSENT else node
    return node if queue.state in (ABSENT, "ACTIVE") else queue

  def _describe(self, command: list[str]) -> Described:
    answer = self._try(command, lambda answer: tpu_commands.is_absent(answer.error))
    if answer.code == 0:
      return tpu_commands.described(answer.out, self._tpu.name)
    if tpu_commands.is_absent(answer.error):
      return Described(ABSENT)
    raise self._error("looking at the TPU", command, answer)

  def _check_type(self, found: Described) -> None:
    wanted = self._tpu.accelerator_type
    if found.accelerator_type and found.accelerator_type != wanted:
      raise LaunchError(
        f"{self._tpu.name} is a {found.accelerator_type}, not the {wanted} that was asked for",
        f"another --name, or --accelerator_type={found.accelerator_type}",
        USAGE,
      )

  def _create(self) -> None:
    while True:
      answer = self._try(
        self._tpu.create(),
        lambda answer: tpu_commands.exists(answer.error) or tpu_commands.is_full(answer.error),
      )
      if answer.code == 0 or tpu_commands.exists(answer.error):
        self._created |= answer.code == 0
        self._ours |= self._created
        return
      if not tpu_commands.is_full(answer.error) or tpu_commands.permanent(answer.error):
        raise self._error("asking for the TPU", self._tpu.create(), answer)
      self._tell(f"{self._tpu.zone} has none to spare: trying again")
      self._sleep(self._plan.poll)

  def _replace(self, found: Described, asked: bool) -> None:
    reason = f": {found.reason}" if found.reason else ""
    if asked and found.state == "FAILED":
      raise LaunchError(f"the request for the TPU failed{reason}", self.still_there())
    if not self._ours:
      raise LaunchError(
        f"{self._tpu.name} is {found.state}, and was not created by this launcher",
        f"{self.still_there()}  # or another --name",
      )
    self._replaced += 1
    if self._replaced > self._plan.max_restarts:
      raise LaunchError(
        f"{self._tpu.name} was taken away {self._replaced} times, more than --max_restarts allows",
        "the same command goes on where it stopped",
        STOPPED,
      )
    self._say(f"{self._tpu.name} is {found.state}{reason}: deleting it, to ask for it again")
    self._delete()
    self._log = Log()

  def _delete(self) -> None:
    command = self._tpu.delete()
    if self._tpu.queued and self._describe(self._tpu.describe_queued()).state != ABSENT:
      command = self._tpu.delete_queued()
    answer = self._try(command, lambda answer: tpu_commands.is_absent(answer.error))
    if answer.code and not tpu_commands.is_absent(answer.error):
      raise self._error("deleting the TPU, which still costs money,", command, answer)

  def _start(self, job: Job) -> None:
    command = self._plan.start(job)
    answer = self._try(command, lambda answer: answer.code == tpu_scripts.OTHER)
    if answer.code == tpu_scripts.OTHER:
      raise LaunchError(
        f"{self._tpu.name} is running another command as {self._plan.name(job)}",
        f"{shlex.join(self._plan.stop(job))}  # or another --name",
        USAGE,
      )
    if answer.code:
      raise self._error("starting the run", command, answer)

  def _follow(self, job: Job) -> int | None:
    """Prints the log until the run ends: its exit code, or None where the machine is gone."""
    log, failures = self._log, 0
    while True:
      answer = stream(self._plan.follow(job, log.next_byte), log.hear)
      mark = log.take_mark()
      if mark.startswith("ended"):
        return self._ended(int(mark.split()[1]))
      state = self._state().state
      if mark == "lost" or state != READY:
        self._say(f"the run on {self._tpu.name} ({state}) was lost")
        return None
      failures = 0 if mark == "running" else failures + 1
      if failures > self._plan.tries:
        raise LaunchError(
          f"{self._tpu.name} is {READY} but cannot be reached "
          f"({tpu_commands.last_line(answer.error)}); the run may go on, and costs money",
          shlex.join(self._tpu.ssh("true", worker="0")),
          STOPPED,
        )
      if failures:
        self._sleep(self._plan.poll)

  def _ended(self, code: int) -> int | None:
    """An exit code, or None where the TPU is being taken away, which may end a run with any."""
    if code in (0, STOPPED, USAGE):
      return code
    self._sleep(self._plan.poll)
    return code if self._state().state == READY else None

  def _explain(self, job: Job, code: int) -> None:
    name = self._plan.name(job)
    self._say(f"{name}: failed with exit code {code}; the last errors of all hosts:")
    answer = call(self._plan.errors(job))
    self._say(answer.out.rstrip() or "none in the logs")
    self._say(f"whole logs are in {job.workdir}/logs; the same command tries again from there")

  def _conclude(self, failed: bool) -> None:
    if not self._ours:
      if self._started:
        self._say(f"{self._tpu.name} was not created by this launcher: it is left as it is")
      return
    if self._plan.keep or (failed and self._plan.keep_on_failure):
      self._say(f"{self._tpu.name} is kept and costs money; to delete it: {self.still_there()}")
      return
    self._delete()
    self._say(f"{self._tpu.name} is deleted")

  def _abandon(self) -> None:
    try:
      self._delete()
      self._say(f"{self._tpu.name} is deleted")
    except LaunchError as error:
      self._say(f"error: {error}")

  def _must(self, doing: str, command: list[str]) -> Answer:
    answer = self._try(command)
    if answer.code:
      raise self._error(doing, command, answer)
    return answer

  def _try(
    self, command: list[str], enough: Callable[[Answer], bool] = lambda answer: False
  ) -> Answer:
    """Until it succeeds, says something that is answer enough, or trying again is no use."""
    for attempt in range(self._plan.tries):
      if attempt:
        self._sleep(min(5.0 * 2**attempt, 120.0))
      answer = call(command)
      if answer.code == 0 or enough(answer) or tpu_commands.permanent(answer.error):
        break
    return answer

  def _error(self, doing: str, command: list[str], answer: Answer) -> LaunchError:
    kind = tpu_commands.permanent(answer.error)
    said = tpu_commands.last_line(answer.error or answer.out)
    action = kind.next if kind else shlex.join(command)
    if self._started:
      action += f"; then the same command, or to delete the TPU: {self.still_there()}"
    return LaunchError(f"{doing} failed (exit code {answer.code}): {said}", action)

  def _tell(self, line: str) -> None:
    """Says what was not just said."""
    if line != self._said:
      self._say(line)
    self._said = line


class Log:
  """What is heard of a log: prints it, counts its bytes, and keeps the launcher's own lines."""

  def __init__(self):
    self.next_byte = 0
    self._mark = ""

  def hear(self, line: bytes) -> None:
    """One line."""
    mark = tpu_scripts.MARK.encode()
    if line.startswith(mark):
      self._mark = line.removeprefix(mark).decode(errors="replace").strip()
      if self._mark.startswith("from "):
        self.next_byte = int(self._mark.removeprefix("from "))
        self._mark = ""
    elif line.endswith(b"\n"):
      self.next_byte += len(line)
      sys.stdout.write(line.decode(errors="replace"))
      sys.stdout.flush()

  def take_mark(self) -> str:
    """How the last connection ended: `running`, `lost`, `ended CODE`, or empty: it broke."""
    mark, self._mark = self._mark, ""
    return mark
