"""Multi-process runs: start, exchange of small values, barriers, and the end of all processes together.

Every process runs the same program on its own devices and its own rows of each batch. Process 0 is
the writer: only it writes files and prints. Arrays are exchanged by the devices, inside jitted
functions. The functions of this module use no device. They use the coordination service of
`jax.distributed`, a small key-value store in process 0.

When one process ends, the module `peers` ends all the others.
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

# jax has no public name for its key-value store; orbax imports it from here too.
from jax._src.distributed import global_state

from byolx.core import peers
from byolx.core.peers import EXIT_LOST, NO_TIMEOUT_MS, ROOT, WATCH, Group

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
"""Default time limits of `initialise`, in seconds: without a heartbeat from another process, and
for the start of all processes."""


class DistributedError(RuntimeError):
  """Raised if this process cannot connect to process 0, or if process 0 cannot listen on its port."""


_group: Group | None = None


def initialise(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  peer_timeout: float = PEER_TIMEOUT,
  start_timeout: float = START_TIMEOUT,
) -> None:
  """Connects this process to the others of the run; must be called before jax initialises its devices.

  jax's SIGTERM handler is not installed, because it would hide the signal from Python's handlers.

  Args:
    coordinator: address HOST:PORT on which process 0 listens. Give either all of `coordinator`,
      `processes` and `process`, or none of them. Give none only on a TPU pod, or in a cluster that
      jax detects from the environment (SLURM, Open MPI, Kubernetes).
    processes: number of processes.
    process: index of this process, in 0 to processes - 1.
    peer_timeout: seconds without a heartbeat after which another process counts as lost.
    start_timeout: seconds to wait for the other processes at the start. After that, this process
      exits with code 1.

  Raises:
    ValueError: only some of the first three arguments are given, one of them is invalid, or none is
      given and no cluster is detected.
    DistributedError: process 0 cannot listen on the port, or the connection failed.
  """
  global _group
  are_set = [value is not None for value in (coordinator, processes, process)]
  if any(are_set) and not all(are_set):
    raise ValueError("expected coordinator, processes and process together, or none of them")
  if all(are_set):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
      raise ValueError(f"coordinator is {coordinator!r}; expected HOST:PORT")
    if not 0 <= process < processes:
      raise ValueError(f"process is {process} of {processes}; expected 0 to {processes - 1}")
  jax.config.update("jax_enable_preemption_service", False)
  peers_text = f"the {processes} processes at {coordinator}" if all(are_set) else "other processes"
  message = f"not all of {peers_text} connected within {start_timeout:.0f} s"
  with _deadline(start_timeout, message):
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
      # jax aborts with a stack trace at its own time limits, so they must be longer than ours. It
      # sends a heartbeat every half of its limit, and so may notice a lost process only after that.
      initialization_timeout=math.ceil(start_timeout) + 60,
      heartbeat_timeout_seconds=2 * (math.ceil(peer_timeout) + 20),
    )
  except ValueError:
    raise ValueError("no cluster was detected; give coordinator, processes and process") from None
  except RuntimeError as error:
    raise DistributedError(f"coordinator {coordinator}: {str(error).splitlines()[0]}") from None


def _check_port(port: int) -> None:
  """Raises DistributedError if process 0 cannot listen on a port; without this check, jax may crash."""
  dualstack = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dualstack else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=dualstack).close()
  except (OSError, OverflowError) as error:
    raise DistributedError(f"process 0 cannot listen on port {port}: {error}") from None


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
  """Context manager that ends this process with exit code 1 if its block takes too long.

  A timer thread ends the process, because jax's wait for the other processes cannot be interrupted.

  Args:
    seconds: longest time that the block may take.
    message: error message printed before the exit.
  """

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
  """Returns the number of processes, without initialising jax's devices."""
  return _group.count if _group else 1


def index() -> int:
  """Returns the index of this process, in 0 to `count()` - 1."""
  return _group.index if _group else 0


def is_writer() -> bool:
  """Returns True on process 0, the only process that writes files and prints."""
  return index() == 0


def barrier(name: str) -> None:
  """Waits, without a time limit, until every process has called `barrier` with the same name."""
  if _group:
    number = _group.next_call(name)
    _group.client.wait_at_barrier(f"{ROOT}/barrier/{name}/{number}", NO_TIMEOUT_MS)


def agree(value: Any) -> Any:
  """Returns, on every process, the value that process 0 passes.

  All processes must call `agree`, `barrier` and `any_process` in the same order, each process from
  one thread only.

  Args:
    value: value to return, serialisable as JSON. The values that other processes pass are ignored.
  """
  if not _group:
    return value
  key = f"{ROOT}/agree/{_group.next_call('agree')}"
  if is_writer():
    _group.client.key_value_set(key, json.dumps(value))
    return json.loads(json.dumps(value))
  return json.loads(_group.client.blocking_key_value_get(key, NO_TIMEOUT_MS))


def any_process(flag: bool) -> bool:
  """Returns True on every process if any process passes True; waits until all have called it.

  Args:
    flag: value of this process.
  """
  if not _group:
    return flag
  key = f"{ROOT}/any/{_group.next_call('any')}/"
  if flag:
    _group.client.key_value_set(f"{key}{_group.index}", "")
  barrier("any")
  return bool(_group.client.key_value_dir_get(key))


class Soon:
  """A request that any process may make, and that all processes grant at the same call.

  An example is the request to stop a run. Every process calls the object equally often, such as
  after every step. A process makes the request by `soon(True)`, and calls `soon(False)` otherwise.
  After a request, one later call returns True on all processes. All other calls return False.

  Background threads agree on that later call, which takes about a second. A call that is made during
  the agreement waits for its end. A request in the last second of a loop may not be granted, because
  no call is left; use `any_process` after the loop. With a single process, each call returns its
  argument.

  Args:
    name: name of the request, the same on every process.
  """

  def __init__(self, name: str):
    self._name, self._round = name, 0
    self._calls, self._requested = 0, False
    self._agreed_call: int | None = None
    self._lock = threading.Lock()
    self.negotiating = False
    if _group:
      # The number separates this object from an earlier one of the same name.
      number = _group.next_call(f"soon {name}")
      self._path = f"{WATCH}soon/{name}/{number}/"
      _group.requests[name] = self

  def __call__(self, requested: bool) -> bool:
    if not _group:
      return requested
    with self._lock:
      self._calls += 1
      self._requested |= requested
      if self._calls != self._agreed_call:
        return False
      self._agreed_call, self._requested = None, False
      self._round += 1
      return True

  def negotiate(self, entries: dict[str, str]) -> None:
    """Takes one step towards an agreement of all processes on the call that returns True.

    It runs in a background thread. Each process publishes how often it has called the object. A lock
    delays its next call until the agreement. If the largest published number is n, then call n + 1
    returns True on all processes.

    Args:
      entries: all entries of the key-value store whose keys begin with `peers.WATCH`.
    """
    if self._agreed_call is not None:
      return
    prefix = f"{self._path}{self._round}/"
    if not self.negotiating and (self._requested or f"{prefix}notice" in entries):
      self._lock.acquire()
      self.negotiating = True
      _group.client.key_value_set(f"{prefix}notice", "", allow_overwrite=True)
      _group.client.key_value_set(f"{prefix}at/{_group.index}", str(self._calls))
    elif self.negotiating:
      calls = [entries.get(f"{prefix}at/{i}") for i in range(_group.count)]
      if None not in calls:
        self._agreed_call = max(map(int, calls)) + 1
        self.negotiating = False
        self._lock.release()


def leave(code: int, reason: str) -> None:
  """Ends this process and all others with an exit code; does nothing if there is only one process.

  Args:
    code: exit code of all processes.
    reason: text that the other processes print after the name of this process, such as `failed: no
      such file`. This process does not print it.
  """
  if _group:
    _group.publish_end({"code": code, "reason": f"{_group.name(_group.index)} {reason}"})
    _group.leave(code, readers=_group.count)


def await_reason() -> None:
  """Checks, after an error in this process, whether the error comes from the end of another process.

  The function waits slightly longer than the time after which a process counts as lost. If another
  process has ended, this process prints why and exits. If none has ended, the function returns.
  """
  if _group and _group.over.wait(_group.peer_timeout + 3):
    threading.Event().wait()  # the watching thread is about to end this process


def finish() -> None:
  """Waits until all processes call `finish`, then disconnects this process from the others.

  Without this call, a process that ends normally would count as lost.
  """
  global _group
  if _group:
    barrier("finish")
    _group.over.set()
    for thread in _group.threads:
      thread.join()
    _group = None
    jax.distributed.shutdown()


def prefix() -> str:
  """Returns the text that begins each line that this process prints, such as `process 1: `.

  The text is empty if the run has only one process.
  """
  return _group.prefix if _group else ""
