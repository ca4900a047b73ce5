"""The commands of gcloud that a launch needs, as argument lists, and what its answers mean."""

import dataclasses
import json
from typing import Any, NamedTuple

OWNER = "byolx-launch"
"""Label of what this launcher creates; nothing without it is ever deleted."""

RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}

READY, ABSENT = "READY", "ABSENT"
STOPPED_STATES = ("STOPPED",)
BROKEN_STATES = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "HIDDEN")
"""Of a TPU or a queued resource that comes back only if it is deleted and asked for again."""


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A TPU VM to be asked for.

  Args:
    name: of the TPU, and of the queued resource.
    zone: such as europe-west4-a.
    accelerator_type: such as v3-512.
    runtime_version: software of its hosts.
    project: empty: gcloud's own.
    queued: ask for a queued resource; else for the TPU at once.
    spot: cheaper, and taken away when others want it.
    service_account: what its hosts act as; empty: the project's default.
    create_flags: more flags for the command that creates.
    ssh_flags: more flags for ssh and scp.
  """

  name: str
  zone: str
  accelerator_type: str
  runtime_version: str
  project: str = ""
  queued: bool = True
  spot: bool = False
  service_account: str = ""
  create_flags: tuple[str, ...] = ()
  ssh_flags: tuple[str, ...] = ()

  def create(self) -> list[str]:
    """Asks for it."""
    flags = [f"--accelerator-type={self.accelerator_type}", f"--labels={OWNER}={self.name}"]
    flags += ["--spot"] if self.spot else []
    flags += [f"--service-account={self.service_account}"] if self.service_account else []
    flags += self.create_flags
    if self.queued:
      node = [f"--node-id={self.name}", f"--runtime-version={self.runtime_version}"]
      return self._queue("create", *node, *flags)
    return self._vm("create", f"--version={self.runtime_version}", *flags)

  def describe(self) -> list[str]:
    """Prints its state as JSON."""
    return self._vm("describe", "--format=json")

  def describe_queued(self) -> list[str]:
    """Prints the queued resource's state as JSON."""
    return self._queue("describe", "--format=json")

  def boot(self) -> list[str]:
    """Starts one that was stopped."""
    return self._vm("start")

  def delete(self) -> list[str]:
    """Deletes the TPU."""
    return self._vm("delete", "--quiet")

  def delete_queued(self) -> list[str]:
    """Deletes the queued resource, and the TPU with it."""
    return self._queue("delete", "--force", "--quiet")

  def ssh(self, script: str, worker: str = "all") -> list[str]:
    """Runs a script on one worker, or on all at the same time."""
    flags = (f"--worker={worker}", "--quiet", *self.ssh_flags)
    return self._vm("ssh", *flags, f"--command={script}")

  def upload(self, file: str) -> list[str]:
    """Copies a file to the home directory on all workers."""
    there = (f"{self.name}:", *self._where(), "--worker=all", "--quiet")
    return [*_TPUS, "tpu-vm", "scp", file, *there, *self.ssh_flags]

  def _vm(self, verb: str, *flags: str) -> list[str]:
    return [*_TPUS, "tpu-vm", verb, self.name, *self._where(), *flags]

  def _queue(self, verb: str, *flags: str) -> list[str]:
    return [*_TPUS, "queued-resources", verb, self.name, *self._where(), *flags]

  def _where(self) -> list[str]:
    return [*([f"--project={self.project}"] if self.project else []), f"--zone={self.zone}"]


_TPUS = ("gcloud", "compute", "tpus")


class Described(NamedTuple):
  """What `describe` said: a state, or ABSENT; whether this launcher created it; why it failed."""

  state: str
  ours: bool = False
  accelerator_type: str = ""
  reason: str = ""


def described(text: str, name: str) -> Described:
  """Reads the JSON of a TPU or of a queued resource."""
  found: dict[str, Any] = json.loads(text)
  state = found.get("state") or {}
  labels = found.get("labels") or {}
  reason = ""
  if isinstance(state, dict):
    nodes = found.get("tpu", {}).get("nodeSpec", [])
    labels = {key: value for spec in nodes for key, value in _labels(spec).items()} | labels
    reason = (state.get("failedData") or {}).get("error", {}).get("message", "")
    state = state.get("state", "UNKNOWN")
  return Described(state, labels.get(OWNER) == name, found.get("acceleratorType", ""), reason)


def _labels(spec: dict[str, Any]) -> dict[str, str]:
  return (spec.get("node") or {}).get("labels") or {}


@dataclasses.dataclass(frozen=True)
class Failure:
  """A kind of failure: words of gcloud that tell it, and what to do next; empty: try it again."""

  words: tuple[str, ...]
  next: str = ""


FAILURES = (
  Failure(
    (
      "unauthenticated",
      "reauthentication",
      "gcloud auth login",
      "current auth tokens",
      "active account",
    ),
    "gcloud auth login",
  ),
  Failure(
    ("has not been used in project", "service_disabled", "api is not enabled"),
    "gcloud services enable tpu.googleapis.com",
  ),
  Failure(
    ("permission_denied", "does not have permission", "required permission"),
    "gcloud projects get-iam-policy PROJECT, for the role roles/tpu.admin",
  ),
  Failure(
    ("quota limit", "quota exceeded", "quota_exceeded", "insufficient quota"),
    "gcloud compute tpus accelerator-types list --zone=ZONE, and ask for quota or take another zone",
  ),
  Failure(
    ("invalid_argument", "unrecognized arguments", "invalid choice", "invalid value for"),
    "launch/gcloud_tpu.py --help",
  ),
)
"""Those that trying again does not help."""

_ABSENT_WORDS = ("not_found", "was not found", "could not be found", "not found")
_EXISTS_WORDS = ("already_exists", "already exists")
_FULL_WORDS = ("no more capacity", "resource_exhausted", "stockout", "insufficient capacity")


def permanent(message: str) -> Failure | None:
  """What kind of failure trying again does not help, or None: of gcloud itself, not of a host."""
  lower = message.lower().partition("error: (gcloud")[2]
  return next((kind for kind in FAILURES if any(word in lower for word in kind.words)), None)


def is_absent(message: str) -> bool:
  """Whether gcloud says that there is no such thing."""
  return any(word in message.lower() for word in _ABSENT_WORDS)


def exists(message: str) -> bool:
  """Whether gcloud says that it was created before."""
  return any(word in message.lower() for word in _EXISTS_WORDS)


def is_full(message: str) -> bool:
  """Whether the zone has no such TPU to spare now."""
  return any(word in message.lower() for word in _FULL_WORDS)


def last_line(message: str) -> str:
  """The last line that says something."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return lines[-1] if lines else "no message"
