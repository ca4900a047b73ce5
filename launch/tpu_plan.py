"""Plan of a launch on a TPU, and the commands of its steps."""

import dataclasses

import tpu_scripts
from jobs import Job
from tpu_commands import Tpu
from tpu_scripts import DATA, WORK, Mount

_WRITTEN = ("workdir", "compile.cache")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Options of a launch; the methods return the commands of its steps.

  Args:
    tpu: TPU of the launch.
    jobs: runs, which follow one another.
    config: FILE[:ARGS], with the path of FILE relative to the root of the checkout.
    source: git address that hosts clone; empty: `archive` is uploaded.
    commit: full hash of the commit.
    archive: path of the packed commit to upload; empty without an upload.
    cache_gb: GiB of each host's memory for a cache of images; 0: no cache.
    setup: shell command for all hosts before the first start; empty: none.
    max_restarts: largest number of restarts of one run after preemptions and stops.
    keep: whether the TPU is kept at the end.
    keep_on_failure: whether the TPU is kept if a run fails.
    poll: seconds between two queries of a state.
    tries: attempts of a failing command, at most.
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
    """Commands that prepare the hosts: upload, installation, mounts and setup."""
    commands = [self.tpu.upload(self.archive)] if not self.source else []
    commands.append(self.tpu.ssh(tpu_scripts.install(self.source, self.commit)))
    mounts = dict.fromkeys(mount for job in self.jobs for mount in _hosted(job)[1])
    if mounts:
      commands.append(self.tpu.ssh(tpu_scripts.mount(list(mounts), self.cache_gb)))
    if self.setup:
      commands.append(self.tpu.ssh(self.setup))
    return commands

  def name(self, job: Job) -> str:
    """Name of a job on the hosts."""
    return job.name or self.tpu.name

  def start(self, job: Job) -> list[str]:
    """Command that starts a job on all hosts."""
    hosted, _ = _hosted(job)
    arguments = [*dataclasses.replace(hosted, config=self.config).train(), "--distributed"]
    return self.tpu.ssh(tpu_scripts.start(self.name(job), arguments, hosted.workdir))

  def settle(self, job: Job) -> list[str]:
    """Command that waits until a job has ended on all hosts."""
    return self.tpu.ssh(tpu_scripts.settle(self.name(job)))

  def follow(self, job: Job, start_at: int) -> list[str]:
    """Command that prints the log of worker 0 from byte `start_at`, see `tpu_scripts.follow`."""
    return self.tpu.ssh(tpu_scripts.follow(self.name(job), start_at, self.watch), worker="0")

  def errors(self, job: Job) -> list[str]:
    """Command that prints the last errors of every host."""
    return self.tpu.ssh(tpu_scripts.errors(self.name(job)))

  def stop(self, job: Job) -> list[str]:
    """Command that makes a job save and end."""
    return self.tpu.ssh(tpu_scripts.stop(self.name(job)))


def _hosted(job: Job) -> tuple[Job, list[Mount]]:
  """Job with folders of the hosts in place of gs:// addresses, and the mounts of these folders."""
  mounts = []

  def folder(name: str, address: str) -> str:
    mount, path = tpu_scripts.mounted(address, WORK if name in _WRITTEN else DATA)
    mounts.append(mount)
    return path

  return job.moved(folder), mounts
