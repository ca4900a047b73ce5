"""Runs a launch: requests a TPU, starts the training, prints its log, restarts it, deletes the TPU."""

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
  """Error of a launch that cannot continue.

  Args:
    happened: description of what failed.
    next_action: command or advice with which the user can continue.
    code: exit code with which the launcher ends.
  """

  def __init__(self, happened: str, next_action: str, code: int = FAILED):
    super().__init__(f"{happened}; next: {next_action}")
    self.code = code


class Answer(NamedTuple):
  """Result of a command.

  Args:
    code: exit code.
    out: text of stdout.
    error: text of stderr.
  """

  code: int
  out: str
  error: str


def call(argv: Sequence[str]) -> Answer:
  """Runs a command, without stdin, waits for its end, and returns exit code and output."""
  done = subprocess.run(
    argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
  )
  return Answer(done.returncode, done.stdout, done.stderr)


def stream(argv: Sequence[str], on_line: Callable[[bytes], None]) -> Answer:
  """Runs a command and passes each line of stdout to a function while the command runs.

  Returns the exit code and stderr; the result contains no stdout.

  Args:
    argv: words of the command.
    on_line: function to call with each line, as bytes with the line's end.
  """
  with (
    tempfile.TemporaryFile() as errors,
    subprocess.Popen(
      argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
    ) as process,
  ):
    try:
      for line in process.stdout or ():
        on_line(line)
    except BaseException:
      process.terminate()
      raise
    code = process.wait()
    errors.seek(0)
    return Answer(code, "", errors.read().decode(errors="replace"))


class Launcher:
  """Launcher that creates a TPU, runs the jobs of a plan on it, and deletes the TPU.

  Args:
    plan: jobs to run, the TPU and other options.
    sleep: function that waits for a number of seconds.
    report: function that prints one line for the user.
  """

  def __init__(
    self,
    plan: Plan,
    sleep: Callable[[float], None] = time.sleep,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
  ):
    self._plan, self._tpu = plan, plan.tpu
    self._sleep, self._report = sleep, report
    self._owned = self._created = self._started = False
    self._replaced = 0
    self._log = Log()
    self._status = ""

  def run(self) -> int:
    """Runs all jobs one after another, then deletes the TPU; returns 0 or a failed job's exit code.

    After a failed job, the other jobs are not run. A TPU is not deleted if the plan keeps it or if
    the launcher did not create it.

    Raises:
      LaunchError: the launch cannot continue.
    """
    try:
      for job in self._plan.jobs:
        code = self._run(job)
        if code:
          break
      else:
        code = 0
    except LaunchError:
      # A TPU without a run costs money for nothing; a run that has started may go on.
      if self._created and not self._started and not self._plan.keep_on_failure:
        self._abandon()
      raise
    self._conclude(failed=bool(code))
    return code

  def stop(self) -> int:
    """Makes all jobs save and end, waits for their ends, then deletes the TPU; returns 0.

    A TPU is not deleted if the plan keeps it or if the launcher did not create it.

    Raises:
      LaunchError: a command fails.
    """
    if self._state().state == READY:
      for job in self._plan.jobs:
        self._require("stopping the run", self._plan.stop(job))
        self._require("waiting for the run to end", self._plan.settle(job))
    self._conclude(failed=False)
    return 0

  def delete_command(self) -> str:
    """Returns the shell command with which the user can delete the TPU."""
    return shlex.join(self._tpu.delete_queued() if self._tpu.queued else self._tpu.delete())

  def _run(self, job: Job) -> int:
    """Runs a job to its end, with restarts after preemptions and stops; returns its exit code.

    Raises:
      LaunchError: the launch cannot continue, or there were too many restarts.
    """
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
        self._report(f"{self._plan.name(job)}: done; results are in {job.workdir}")
        return 0
      if end not in (STOPPED, None):
        self._report_failure(job, end)
        return end
      restarts += 1
      if restarts > self._plan.max_restarts:
        raise LaunchError(
          f"{restarts} stops of {self._plan.name(job)}, more than --max_restarts allows",
          "the same command goes on where it stopped",
          STOPPED,
        )
      self._report(f"restart {restarts} of at most {self._plan.max_restarts}")

  def _prepare(self, job: Job, again: bool) -> None:
    """Installs the code on all hosts of the TPU, and starts a job.

    A host that has the code already, or that runs the job already, is left as it is.

    Args:
      job: job to start.
      again: whether the job was started before, so that its end has to be awaited first.
    """
    for command in self._plan.install():
      self._require("installing", command)
    if again:
      self._require("waiting for the last run to end", self._plan.settle(job))
    self._start(job)
    self._started = True

  def _bring_up(self) -> None:
    """Waits until the TPU is ready; requests it if it does not exist, and replaces a broken one."""
    requested = False
    while True:
      tpu = self._state()
      if tpu.state == READY:
        self._check_type(tpu)
        return
      if tpu.state == ABSENT:
        self._report_status(f"requesting {self._tpu.accelerator_type} {self._tpu.name}")
        self._create()
        requested = True
      elif tpu.state in STOPPED_STATES:
        self._require("starting the TPU", self._tpu.boot())
      elif tpu.state in BROKEN_STATES:
        self._replace(tpu, requested)
        continue
      else:
        self._report_status(f"{self._tpu.name} is {tpu.state}: waiting")
      self._sleep(self._plan.poll)

  def _state(self) -> Described:
    """Returns the state of the TPU, or of the queued request for it if the TPU is not ready."""
    node = self._describe(self._tpu.describe())
    self._owned |= node.owned
    if not self._tpu.queued or node.state == READY:
      return node
    queue = self._describe(self._tpu.describe_queued())
    self._owned |= queue.owned
    if queue.state == "ACTIVE" and node.state == ABSENT:
      # The TPU may have become ready after the first query. If still absent, it was preempted.
      node = self._describe(self._tpu.describe())
      return queue._replace(state="TERMINATED") if node.state == ABSENT else node
    return node if queue.state in (ABSENT, "ACTIVE") else queue

  def _describe(self, command: list[str]) -> Described:
    answer = self._try(command, lambda answer: tpu_commands.is_absent(answer.error))
    if answer.code == 0:
      return tpu_commands.described(answer.out, self._tpu.name)
    if tpu_commands.is_absent(answer.error):
      return Described(ABSENT)
    raise self._error("describing the TPU", command, answer)

  def _check_type(self, tpu: Described) -> None:
    requested = self._tpu.accelerator_type
    if tpu.accelerator_type and tpu.accelerator_type != requested:
      raise LaunchError(
        f"{self._tpu.name} is a {tpu.accelerator_type}, expected {requested}",
        f"another --name, or --accelerator_type={tpu.accelerator_type}",
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
        self._owned |= self._created
        return
      if not tpu_commands.is_full(answer.error) or tpu_commands.permanent(answer.error):
        raise self._error("requesting the TPU", self._tpu.create(), answer)
      self._report_status(f"{self._tpu.zone} has no capacity now: trying again")
      self._sleep(self._plan.poll)

  def _replace(self, tpu: Described, requested: bool) -> None:
    """Deletes a broken TPU, so that it can be requested again, at most `max_restarts` times.

    Args:
      tpu: state of the TPU.
      requested: whether the TPU was requested just before; then a failed request is an error.

    Raises:
      LaunchError: the request failed, the TPU was not created by this launcher, or TPUs were lost
        too often.
    """
    reason = f": {tpu.reason}" if tpu.reason else ""
    if requested and tpu.state == "FAILED":
      raise LaunchError(f"the request for the TPU failed{reason}", self.delete_command())
    if not self._owned:
      raise LaunchError(
        f"{self._tpu.name} is {tpu.state}, and was not created by this launcher",
        f"{self.delete_command()}  # or another --name",
      )
    self._replaced += 1
    if self._replaced > self._plan.max_restarts:
      raise LaunchError(
        f"{self._tpu.name} was lost {self._replaced} times, more than --max_restarts allows",
        "the same command goes on where it stopped",
        STOPPED,
      )
    self._report(f"{self._tpu.name} is {tpu.state}{reason}: deleting it, to request it again")
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
    """Prints the log of a job until it ends, and returns the job's exit code.

    Returns None if the job was lost, for example because the TPU was preempted.
    """
    log, failures = self._log, 0
    while True:
      answer = stream(self._plan.follow(job, log.next_byte), log.add)
      mark = log.take_mark()
      if mark.startswith("ended"):
        return self._ended(int(mark.split()[1]))
      state = self._state().state
      if mark == "lost" or state != READY:
        self._report(f"the run on {self._tpu.name} ({state}) was lost")
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
    """Returns the exit code of an ended run, or None if a preemption seems to have ended it.

    A preemption can end a run with any exit code. It is assumed if the run failed and the TPU is
    not ready after a short wait.
    """
    if code in (0, STOPPED, USAGE):
      return code
    self._sleep(self._plan.poll)
    return code if self._state().state == READY else None

  def _report_failure(self, job: Job, code: int) -> None:
    name = self._plan.name(job)
    self._report(f"{name}: failed with exit code {code}; the last errors of all hosts:")
    answer = call(self._plan.errors(job))
    self._report(answer.out.rstrip() or "no errors in the logs")
    self._report(f"complete logs are in {job.workdir}/logs; the same command starts the run again")

  def _conclude(self, failed: bool) -> None:
    """Deletes the TPU at the end, unless the plan keeps it or the launcher did not create it.

    Args:
      failed: whether a job failed.
    """
    if not self._owned:
      if self._started:
        self._report(f"{self._tpu.name} was not created by this launcher: it is not deleted")
      return
    if self._plan.keep or (failed and self._plan.keep_on_failure):
      self._report(
        f"{self._tpu.name} is kept and costs money; to delete it: {self.delete_command()}"
      )
      return
    self._delete()
    self._report(f"{self._tpu.name} is deleted")

  def _abandon(self) -> None:
    """Deletes the TPU after an error; if the deletion fails too, only prints why."""
    try:
      self._delete()
      self._report(f"{self._tpu.name} is deleted")
    except LaunchError as error:
      self._report(f"error: {error}")

  def _require(self, action: str, command: list[str]) -> Answer:
    """Runs a command with retries and returns the result; raises LaunchError if it fails.

    Args:
      action: description of the command for the error message, such as "installing".
      command: words of the command.
    """
    answer = self._try(command)
    if answer.code:
      raise self._error(action, command, answer)
    return answer

  def _try(
    self, command: list[str], accept: Callable[[Answer], bool] = lambda answer: False
  ) -> Answer:
    """Runs a command, repeats it with growing waits if it fails, and returns the last answer.

    Args:
      command: words of the command.
      accept: function that returns whether a failure needs no further attempt.
    """
    for attempt in range(self._plan.tries):
      if attempt:
        self._sleep(min(5.0 * 2**attempt, 120.0))
      answer = call(command)
      if answer.code == 0 or accept(answer) or tpu_commands.permanent(answer.error):
        break
    return answer

  def _error(self, action: str, command: list[str], answer: Answer) -> LaunchError:
    kind = tpu_commands.permanent(answer.error)
    message = tpu_commands.last_line(answer.error or answer.out)
    next_action = kind.next if kind else shlex.join(command)
    if self._started:
      next_action += f"; then the same command, or to delete the TPU: {self.delete_command()}"
    return LaunchError(f"{action} failed (exit code {answer.code}): {message}", next_action)

  def _report_status(self, line: str) -> None:
    """Prints a line about the TPU's state, unless it is the same as the last such line."""
    if line != self._status:
      self._report(line)
    self._status = line


class Log:
  """Receiver of a run's log: prints the lines and counts their bytes.

  Lines that begin with MARK are messages of the host's script to the launcher and are not printed;
  the last one is remembered.
  """

  def __init__(self):
    self.next_byte = 0
    self._mark = ""

  def add(self, line: bytes) -> None:
    """Prints a line of the log, or remembers it if it begins with MARK.

    A line without a line end is ignored: the connection broke, and it will be sent again.
    """
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
    """Returns and forgets the last message of the host's script about the state of the run.

    It is `running`, `lost` or `ended CODE`; empty if the connection broke before the message.
    """
    mark, self._mark = self._mark, ""
    return mark
