"""Several processes that train as one: how they start, agree, and end together.

Every process runs the same program on its own devices and its own rows of each batch; process 0
is the writer, which alone writes files and prints. Arrays travel between devices inside jitted
functions; what is said here goes through the coordination service of `jax.distributed`, a small
key-value store in process 0, and touches no device.

No process outlives another one, see `peers`.
"""

import json
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

# jax has no public name for its key-value store; orbax takes it from here as well.
from jax._src.distributed import global_state

from byolx.core import peers
from byolx.core.peers import EVER, EXIT_LOST, ROOT, WATCH, Group

__all__ = [
  "EXIT_LOST",
  "DistributedError",
  "Soon",
  "agree",
  "any_process",
  "await_reason",
  "barrier",
  "count",
  "finish",
  "index",
  "initialise",
  "is_writer",
  "leave",
  "prefix",
]

PEER_TIMEOUT, START_TIMEOUT = 30.0, 300.0


class DistributedError(RuntimeError):
  """The processes did not find each other."""


_group: Group | None = None


def initialise(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  peer_timeout: float = PEER_TIMEOUT,
  start_timeout: float = START_TIMEOUT,
) -> None:
  """Joins the processes of a run; comes before anything that makes jax look for devices.

  SIGTERM stays with Python: jax's own handler, which would swallow it, is not installed.

  Args:
    coordinator: HOST:PORT on which process 0 listens. Give it with the next two, or give none of
      them on a TPU pod or in a cluster (SLURM, Open MPI, Kubernetes) whose environment tells.
    processes: how many there are.
    process: which one this is, from 0.
    peer_timeout: seconds without a sign of life after which a process counts as lost.
    start_timeout: seconds to wait for the others; then this process ends.

  Raises:
    ValueError: the arguments do not go together, or nothing in the environment stands in for them.
    DistributedError: the address cannot be used.
  """
  global _group
  given = [value is not None for value in (coordinator, processes, process)]
  if any(given) and not all(given):
    raise ValueError("expected coordinator, processes and process together, or none of them")
  if all(given):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
      raise ValueError(f"coordinator is {coordinator!r}; expected HOST:PORT")
    if not 0 <= process < processes:
      raise ValueError(f"process is {process} of {processes}; expected 0 to {processes - 1}")
  jax.config.update("jax_enable_preemption_service", False)
  whom = f"the {processes} processes at {coordinator}" if all(given) else "the other processes"
  with _deadline(start_timeout, f"{whom} did not all come within {start_timeout:.0f} s"):
    if not jax.distributed.is_initialized():
      _connect(coordinator, processes, process, peer_timeout, start_timeout)
    if global_state.num_processes > 1:
      index = global_state.process_id
      _group = Group(global_state.client, index, global_state.num_processes, peer_timeout)
  if _group is not None:
    peers.explain_aborts(_group, global_state.coordinator_address)


def _connect(
  coordinator: str | None,
  processes: int | None,
  process: int | None,
  peer_timeout: float,
  start_timeout: float,
) -> None:
  if process == 0:
    _check_port(int(coordinator.rpartition(":")[2]))
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      # At its own limits jax aborts with a stack trace: ours come first. A process says that it lives
      # every half of the time that jax waits, and may be lost at the end of such a half.
      initialization_timeout=math.ceil(start_timeout) + 60,
      heartbeat_timeout_seconds=2 * (math.ceil(peer_timeout) + 20),
    )
  except ValueError:
    raise ValueError("no cluster is found; give coordinator, processes and process") from None
  except RuntimeError as error:
    raise DistributedError(f"coordinator {coordinator}: {str(error).splitlines()[0]}") from None


def _check_port(port: int) -> None:
  """jax may crash where it cannot listen."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
  except (OSError, OverflowError) as error:
    raise DistributedError(f"process 0 cannot listen on port {port}: {error}") from None


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
  """Ends the process where the block takes longer: nothing else can, in jax's waiting for others."""

  def end() -> None:
    print(f"byolx: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def count() -> int:
  """How many processes there are; does not make jax look for devices."""
  return _group.count if _group else 1


def index() -> int:
  """Which one this is, from 0."""
  return _group.index if _group else 0


def is_writer() -> bool:
  """Whether this process writes files and prints: process 0 does."""
  return index() == 0


def barrier(name: str) -> None:
  """Waits until every process has come here, for as long as it takes."""
  if _group:
    number = _group.next_call(name)
    _group.client.wait_at_barrier(f"{ROOT}/barrier/{name}/{number}", EVER)


def agree(value: Any) -> Any:
  """The writer's value, on every process; of what JSON can hold. Others wait for it.

  This, `barrier` and `any_process` are for one thread only, and in the same order everywhere.
  """
  if not _group:
    return value
  key = f"{ROOT}/agree/{_group.next_call('agree')}"
  if is_writer():
    _group.client.key_value_set(key, json.dumps(value))
    return json.loads(json.dumps(value))
  return json.loads(_group.client.blocking_key_value_get(key, EVER))


def any_process(flag: bool) -> bool:
  """Whether any process says True. All of them must ask, and wait for the last one."""
  if not _group:
    return flag
  key = f"{ROOT}/any/{_group.next_call('any')}/"
  if flag:
    _group.client.key_value_set(f"{key}{_group.index}", "")
  barrier("any")
  return bool(_group.client.key_value_dir_get(key))


class Soon:
  """A wish of any process that all of them follow after the same call; nobody waits meanwhile.

  Call it equally often everywhere, as after every step. True comes a second or so after some
  process wanted it, at the same call for all, and as often as it is wanted again. It costs
  nothing but a lock, as the watching threads talk about it. A wish in the last second of a
  loop may find no call left to answer: `any_process` after the loop tells.
  """

  def __init__(self, name: str):
    self._name, self._round = name, 0
    self._calls, self._wanted = 0, False
    self._agreed: int | None = None
    self._lock = threading.Lock()
    self.meeting = False
    if _group:
      # A later one of the same name goes on where the earlier one was on every process.
      number = _group.next_call(f"soon {name}")
      self._path = f"{WATCH}soon/{name}/{number}/"
      _group.soons[name] = self

  def __call__(self, wanted: bool) -> bool:
    if not _group:
      return wanted
    with self._lock:
      self._calls += 1
      self._wanted |= wanted
      if self._calls != self._agreed:
        return False
      self._agreed, self._wanted = None, False
      self._round += 1
      return True

  def attend(self, entries: dict[str, str]) -> None:
    """By the watching thread: all halt at their call, and agree on the one after the last."""
    if self._agreed is not None:
      return
    here = f"{self._path}{self._round}/"
    if not self.meeting and (self._wanted or f"{here}notice" in entries):
      self._lock.acquire()
      self.meeting = True
      _group.client.key_value_set(f"{here}notice", "", allow_overwrite=True)
      _group.client.key_value_set(f"{here}at/{_group.index}", str(self._calls))
    elif self.meeting:
      calls = [entries.get(f"{here}at/{i}") for i in range(_group.count)]
      if None not in calls:
        self._agreed = max(map(int, calls)) + 1
        self.meeting = False
        self._lock.release()


def leave(code: int, reason: str) -> None:
  """Ends this process and all others with this exit code; alone, it does nothing.

  Args:
    code: exit code.
    reason: what the others will say of this process, such as `failed: no such file`; it has said
      so itself.
  """
  if _group:
    _group.leave_note({"code": code, "reason": f"{_group.name(_group.index)} {reason}"})
    _group.leave(code, readers=_group.count)


def await_reason() -> None:
  """After an error that the end of another process may have caused: waits until that is known.

  Where it is, this process ends here, saying so; else the error is its own, and this returns.
  """
  if _group and _group.over.wait(_group.peer_timeout + 3):
    threading.Event().wait()  # the watching thread is about to end this process


def finish() -> None:
  """The good end: waits for all processes, so that none misses another one."""
  global _group
  if _group:
    barrier("finish")
    _group.over.set()
    for thread in _group.threads:
      thread.join()
    _group = None
    jax.distributed.shutdown()


def prefix() -> str:
  """What a line of one of several processes begins with."""
  return _group.prefix if _group else ""
