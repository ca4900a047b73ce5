"""Plan of a launch: which runs to train on which TPU, and the gcloud command of each step."""

import dataclasses

import tpu_scripts
from jobs import Job
from tpu_commands import Tpu
from tpu_scripts import DATA, WORK, Mount

_WRITTEN = ("workdir", "compile.cache")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Options of a launch on a TPU; the methods return the gcloud command of each step.

  A job is one `byolx train` command. It runs on all hosts, the machines of the TPU.

  Args:
    tpu: TPU to use, with its options.
    jobs: jobs to run, one after another.
    config: config file and its arguments, FILE[:ARGS], with the path relative to the root of the
      checkout.
    source: git address that the hosts clone; empty if `archive` is uploaded instead.
    commit: full hash of the commit to install.
    archive: path of the archive of the commit to upload; empty if the hosts clone `source`.
    cache_gb: GiB of each host's memory for a cache of images; 0 for no cache.
    setup: shell command that prepares each host, run before each start; empty for no command.
    max_restarts: largest number of restarts of one job after preemptions and stops, and of
      replacements of a lost TPU.
    keep: whether the TPU is not deleted at the end.
    keep_on_failure: whether the TPU is not deleted if a job fails.
    poll: seconds between two queries of the TPU's state.
    tries: largest number of attempts of a failing command.
    watch: longest duration, in seconds, of one connection that prints the log.
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
    """Returns the commands that prepare all hosts: install the code, mount buckets, run `setup`."""
    commands = [self.tpu.upload(self.archive)] if not self.source else []
    commands.append(self.tpu.ssh(tpu_scripts.install(self.source, self.commit)))
    mounts = dict.fromkeys(mount for job in self.jobs for mount in _hosted(job)[1])
    if mounts:
      commands.append(self.tpu.ssh(tpu_scripts.mount(list(mounts), self.cache_gb)))
    if self.setup:
      commands.append(self.tpu.ssh(self.setup))
    return commands

  def name(self, job: Job) -> str:
    """Returns the name of a job on the hosts: the name of the grid cell, or else of the TPU."""
    return job.name or self.tpu.name

  def start(self, job: Job) -> list[str]:
    """Returns the gcloud command that starts a job on all hosts of the TPU."""
    hosted, _ = _hosted(job)
    arguments = [*dataclasses.replace(hosted, config=self.config).train(), "--distributed"]
    return self.tpu.ssh(tpu_scripts.start(self.name(job), arguments, hosted.workdir))

  def settle(self, job: Job) -> list[str]:
    """Returns the gcloud command that waits until a job has ended on all hosts of the TPU."""
    return self.tpu.ssh(tpu_scripts.settle(self.name(job)))

  def follow(self, job: Job, start_at: int) -> list[str]:
    """Returns the gcloud command that prints a job's log on the TPU's first host, as it grows.

    Args:
      job: job whose log is printed.
      start_at: first byte of the log to print, from 1; 0 to print only the end of a long log.
    """
    return self.tpu.ssh(tpu_scripts.follow(self.name(job), start_at, self.watch), worker="0")

  def errors(self, job: Job) -> list[str]:
    """Returns the gcloud command that prints the last errors of a job on each host of the TPU."""
    return self.tpu.ssh(tpu_scripts.errors(self.name(job)))

  def stop(self, job: Job) -> list[str]:
    """Returns the gcloud command that makes a job save a checkpoint and end."""
    return self.tpu.ssh(tpu_scripts.stop(self.name(job)))


def _hosted(job: Job) -> tuple[Job, list[Mount]]:
  """Returns a job whose gs:// addresses are replaced by folders, and the mounts of these folders.

  A mount is a Cloud Storage bucket that the hosts of the TPU see as a folder.
  """
  mounts = []

  def folder(name: str, address: str) -> str:
    mount, path = tpu_scripts.mounted(address, WORK if name in _WRITTEN else DATA)
    mounts.append(mount)
    return path

  return job.moved(folder), mounts
