"""What is launched on a TPU and how, and the commands of its steps."""

import dataclasses

import tpu_scripts
from jobs import Job
from tpu_commands import Tpu
from tpu_scripts import DATA, WORK, Mount

_WRITTEN = ("workdir", "compile.cache")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is launched and how.

  Args:
    tpu: on which.
    jobs: one after another.
    config: FILE[:ARGS] as seen from the root of the checkout.
    source: git address, or empty: `archive` is uploaded.
    commit: full hash.
    archive: file to upload.
    cache_gb: memory of each host that keeps data that was read.
    setup: shell command for all hosts, before the first start; empty: none.
    max_restarts: of one run, after preemptions and stops.
    keep: leave the TPU after a good end.
    keep_on_failure: leave it after a bad one.
    poll: seconds between looks at what is not ready.
    tries: of a command that fails.
    watch: seconds of one connection that follows the log.
  """

  tpu: Tpu
  jobs: tuple[Job, ...]
  config: str
  source: str
  commit: str
  archive: str = ""
  cache_gb: int = 0
  setup: str = ""
  max_restarts: int = 50
  keep: bool = False
  keep_on_failure: bool = False
  poll: float = 30.0
  tries: int = 5
  watch: int = 300

  def install(self) -> list[list[str]]:
    """Commands that make the hosts ready: code, mounts, setup."""
    commands = [self.tpu.upload(self.archive)] if not self.source else []
    commands.append(self.tpu.ssh(tpu_scripts.install(self.source, self.commit)))
    mounts = dict.fromkeys(one for job in self.jobs for one in _hosted(job)[1])
    if mounts:
      commands.append(self.tpu.ssh(tpu_scripts.mount(list(mounts), self.cache_gb)))
    if self.setup:
      commands.append(self.tpu.ssh(self.setup))
    return commands

  def name(self, job: Job) -> str:
    """Of a job on the hosts."""
    return job.name or self.tpu.name

  def start(self, job: Job) -> list[str]:
    """The command that starts a job on all hosts."""
    hosted, _ = _hosted(job)
    arguments = [*dataclasses.replace(hosted, config=self.config).train(), "--distributed"]
    return self.tpu.ssh(tpu_scripts.start(self.name(job), arguments, hosted.workdir))

  def settle(self, job: Job) -> list[str]:
    """The command that waits until a job has ended on all hosts."""
    return self.tpu.ssh(tpu_scripts.settle(self.name(job)))

  def follow(self, job: Job, start_at: int) -> list[str]:
    """The command that prints the log of worker 0."""
    return self.tpu.ssh(tpu_scripts.follow(self.name(job), start_at, self.watch), worker="0")

  def errors(self, job: Job) -> list[str]:
    """The command that prints every host's last errors."""
    return self.tpu.ssh(tpu_scripts.errors(self.name(job)))

  def stop(self, job: Job) -> list[str]:
    """The command that asks a job to save and to end."""
    return self.tpu.ssh(tpu_scripts.stop(self.name(job)))


def _hosted(job: Job) -> tuple[Job, list[Mount]]:
  """The job with every gs:// as the folder that it is on the hosts, and the mounts for that."""
  mounts = []

  def folder(name: str, address: str) -> str:
    mount, path = tpu_scripts.mounted(address, WORK if name in _WRITTEN else DATA)
    mounts.append(mount)
    return path

  return job.moved(folder), mounts
