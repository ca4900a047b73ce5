"""Builds the gcloud commands that create, use and delete a TPU, and parses gcloud's output."""

import dataclasses
import json
from typing import Any, NamedTuple

OWNER = "byolx-launch"
"""Label of every TPU that the launcher creates; the launcher deletes no TPU without the label."""

RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
"""Usual software version of a TPU's host machines, by TPU generation."""

READY, ABSENT = "READY", "ABSENT"
STOPPED_STATES = ("STOPPED",)
BROKEN_STATES = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "HIDDEN")
"""States in which a TPU, or a queued request for one, has to be deleted and requested again."""


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A Cloud TPU, described by its options; the methods return the gcloud commands that use it.

  A command is a list of words. A queued resource is a request for a TPU that waits until Google has
  one.

  Args:
    name: name of the TPU and of the queued resource.
    zone: Google Cloud zone, such as europe-west4-a.
    accelerator_type: type of the TPU, such as v3-512.
    runtime_version: software version of the host machines.
    project: Google Cloud project; empty for gcloud's default.
    queued: whether the TPU is requested as a queued resource; False creates it directly.
    spot: whether the TPU is a spot TPU, which is cheaper and may be preempted.
    service_account: service account of the host machines; empty for the project's default.
    create_flags: further flags of the command that creates the TPU.
    ssh_flags: further flags of gcloud's ssh and scp.
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
    """Returns the gcloud command that creates the TPU, or that requests it as a queued resource."""
    flags = [f"--accelerator-type={self.accelerator_type}", f"--labels={OWNER}={self.name}"]
    flags += ["--spot"] if self.spot else []
    flags += [f"--service-account={self.service_account}"] if self.service_account else []
    flags += self.create_flags
    if self.queued:
      node = [f"--node-id={self.name}", f"--runtime-version={self.runtime_version}"]
      return self._queue("create", *node, *flags)
    return self._vm("create", f"--version={self.runtime_version}", *flags)

  def describe(self) -> list[str]:
    """Returns the gcloud command that prints the state of the TPU as JSON."""
    return self._vm("describe", "--format=json")

  def describe_queued(self) -> list[str]:
    """Returns the gcloud command that prints the state of the queued request for a TPU as JSON."""
    return self._queue("describe", "--format=json")

  def boot(self) -> list[str]:
    """Returns the gcloud command that starts a stopped TPU."""
    return self._vm("start")

  def delete(self) -> list[str]:
    """Returns the gcloud command that deletes the TPU."""
    return self._vm("delete", "--quiet")

  def delete_queued(self) -> list[str]:
    """Returns the gcloud command that deletes the queued request together with the TPU."""
    return self._queue("delete", "--force", "--quiet")

  def ssh(self, script: str, worker: str = "all") -> list[str]:
    """Returns the gcloud command that runs a script on the TPU's host machines.

    Args:
      script: bash script.
      worker: index of the only host that runs the script, or "all" for all hosts at the same time.
    """
    flags = (f"--worker={worker}", "--quiet", *self.ssh_flags)
    return self._vm("ssh", *flags, f"--command={script}")

  def upload(self, file: str) -> list[str]:
    """Returns the gcloud command that copies a file to the home directory of all host machines."""
    target = (f"{self.name}:", *self._location(), "--worker=all", "--quiet")
    return [*_TPUS, "tpu-vm", "scp", file, *target, *self.ssh_flags]

  def _vm(self, verb: str, *flags: str) -> list[str]:
    return [*_TPUS, "tpu-vm", verb, self.name, *self._location(), *flags]

  def _queue(self, verb: str, *flags: str) -> list[str]:
    return [*_TPUS, "queued-resources", verb, self.name, *self._location(), *flags]

  def _location(self) -> list[str]:
    return [*([f"--project={self.project}"] if self.project else []), f"--zone={self.zone}"]


_TPUS = ("gcloud", "compute", "tpus")


class Described(NamedTuple):
  """State of a TPU, or of a queued request for one, as gcloud describes it.

  Args:
    state: state in gcloud's words, such as READY; ABSENT if there is no such TPU or request.
    owned: whether the TPU has this launcher's label.
    accelerator_type: type of the TPU; empty for a queued request.
    reason: error message of a failed queued request; empty if none has failed.
  """

  state: str
  owned: bool = False
  accelerator_type: str = ""
  reason: str = ""


def described(text: str, name: str) -> Described:
  """Parses gcloud's JSON description of a TPU, or of a queued request for one.

  Args:
    text: JSON that gcloud printed.
    name: name of the TPU, which is also the value of the launcher's label.
  """
  resource: dict[str, Any] = json.loads(text)
  state = resource.get("state") or {}
  labels = resource.get("labels") or {}
  reason = ""
  if isinstance(state, dict):
    nodes = resource.get("tpu", {}).get("nodeSpec", [])
    labels = {key: value for spec in nodes for key, value in _labels(spec).items()} | labels
    reason = (state.get("failedData") or {}).get("error", {}).get("message", "")
    state = state.get("state", "UNKNOWN")
  return Described(state, labels.get(OWNER) == name, resource.get("acceleratorType", ""), reason)


def _labels(spec: dict[str, Any]) -> dict[str, str]:
  return (spec.get("node") or {}).get("labels") or {}


@dataclasses.dataclass(frozen=True)
class Failure:
  """A kind of gcloud error, recognised by the words of gcloud's message.

  Args:
    words: lower-case texts; a message that contains one of them is of this kind.
    next: command to run or advice for the user.
  """

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
"""Kinds of gcloud errors that a retry does not solve."""

_ABSENT_WORDS = ("not_found", "was not found", "could not be found", "not found")
_EXISTS_WORDS = ("already_exists", "already exists")
_FULL_WORDS = ("no more capacity", "resource_exhausted", "stockout", "insufficient capacity")


def permanent(message: str) -> Failure | None:
  """Returns the kind of a gcloud error that a retry does not solve; None for all other errors.

  Only the text after `ERROR: (gcloud` counts, so errors of a host machine give None.
  """
  lower = message.lower().partition("error: (gcloud")[2]
  return next((kind for kind in FAILURES if any(word in lower for word in kind.words)), None)


def is_absent(message: str) -> bool:
  """Returns whether gcloud's error message means that the TPU or request does not exist."""
  return any(word in message.lower() for word in _ABSENT_WORDS)


def exists(message: str) -> bool:
  """Returns whether gcloud's error message means that the TPU or request exists already."""
  return any(word in message.lower() for word in _EXISTS_WORDS)


def is_full(message: str) -> bool:
  """Returns whether gcloud's error message means that the zone has no free TPU now."""
  return any(word in message.lower() for word in _FULL_WORDS)


def last_line(message: str) -> str:
  """Returns the last line of a message that is not blank; "no message" if there is none."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return lines[-1] if lines else "no message"
