"""Detects when a process of a multi-process run ends, and then ends all the others.

A thread in each process watches the other processes through the key-value store of
`jax.distributed`, which process 0 runs. A process that failed writes an end record, with its reason
and exit code, into the store; a process that was killed sends no more heartbeats. In both cases the
other processes print the name of the ended process and exit at once.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn, Protocol

import jax

EXIT_LOST = 75
"""Exit code of a process that exits because another process of the run is lost. The same command
then resumes the run from its last checkpoint."""

ROOT, WATCH, END = "byolx", "byolx/watch/", "byolx/watch/end"
NO_TIMEOUT_MS = 10 * 24 * 3600 * 1000
"""Ten days in milliseconds: practically no time limit. If a process is lost, the watching thread
ends the wait much earlier."""


class Request(Protocol):
  """Interface of a request that all processes grant at the same time, such as `distributed.Soon`."""

  negotiating: bool

  def negotiate(self, entries: dict[str, str]) -> None:
    """Takes one step towards an agreement with the other processes on when the request is granted.

    The thread that watches the other processes calls this method.

    Args:
      entries: all entries of the key-value store whose keys begin with WATCH.
    """


class Group:
  """The processes of a run, with the threads by which this process watches the others.

  Args:
    client: client of jax's coordination service, which is a key-value store.
    index: index of this process, in 0 to count - 1.
    count: number of processes.
    peer_timeout: seconds without a heartbeat after which another process counts as lost.
  """

  def __init__(self, client: Any, index: int, count: int, peer_timeout: float):
    self.client, self.index, self.count, self.peer_timeout = client, index, count, peer_timeout
    self.calls: dict[str, int] = {}
    self.requests: dict[str, Request] = {}
    self.over = threading.Event()
    self.last_contact = time.monotonic()
    client.key_value_set(f"{ROOT}/host/{index}", socket.gethostname(), allow_overwrite=True)
    client.wait_at_barrier(f"{ROOT}/start", NO_TIMEOUT_MS)
    self.hosts = [
      client.blocking_key_value_get(f"{ROOT}/host/{i}", NO_TIMEOUT_MS) for i in range(count)
    ]
    self.threads = [
      threading.Thread(target=target, daemon=True) for target in (self._watch, self._watch_store)
    ]
    for thread in self.threads:
      thread.start()

  def name(self, index: int) -> str:
    """Returns the name of a process for messages, such as `process 1 (host-b)`."""
    return f"process {index} ({self.hosts[index]})"

  @property
  def prefix(self) -> str:
    """Text that begins each line that this process prints, such as `process 1: `."""
    return f"process {self.index}: "

  def print_error(self, reason: str) -> None:
    """Prints to stderr why this process ends."""
    print(f"byolx: error: {self.prefix}{reason}", file=sys.stderr, flush=True)

  def next_call(self, kind: str) -> int:
    """Returns how often `next_call` was called before with the same `kind`.

    This number identifies a call. It is the same on all processes, because every process makes the
    calls of a kind in the same order.
    """
    self.calls[kind] = self.calls.get(kind, -1) + 1
    return self.calls[kind]

  def _watch(self) -> None:
    beats = 0
    seen: dict[int, tuple[str, float]] = {}
    while not self.over.wait(0.05 if any(r.negotiating for r in self.requests.values()) else 1.0):
      beats += 1
      try:
        self.client.key_value_set(f"{WATCH}alive/{self.index}", str(beats), allow_overwrite=True)
        entries = dict(self.client.key_value_dir_get(WATCH))
        for request in list(self.requests.values()):
          request.negotiate(entries)
      except jax.errors.JaxRuntimeError:
        continue
      now = self.last_contact = time.monotonic()
      if END in entries and not self.over.is_set():
        self.end_with(json.loads(entries[END]))
      for other in range(self.count):
        beat = entries.get(f"{WATCH}alive/{other}", "")
        if seen.get(other, ("none", 0.0))[0] != beat:
          seen[other] = beat, now
        elif now - seen[other][1] > self.peer_timeout:
          self.end_lost(other)

  def _watch_store(self) -> None:
    """Ends this process if process 0, which runs the key-value store, is lost.

    This method runs in a thread of its own. The thread that reads the store cannot do this, because
    it may wait for ever for a lost store.
    """
    while not self.over.wait(1.0):
      if time.monotonic() - self.last_contact > self.peer_timeout:
        self.end_lost(0)

  def end_lost(self, lost: int) -> NoReturn:
    """Ends this process because process `lost` has sent no heartbeat for `peer_timeout` seconds."""
    reason = (
      f"{self.name(lost)} is lost; all others stop. To resume from the last checkpoint, run the same "
      "command on every host"
    )
    self.print_error(reason)
    if lost == 0:
      os._exit(EXIT_LOST)  # the store is gone with process 0, and a call to it might never return
    self.publish_end({"lost": lost, "code": EXIT_LOST, "reason": reason})
    self.leave(EXIT_LOST, readers=self.count - 1)

  def end_with(self, end_record: dict) -> NoReturn:
    """Ends this process with the exit code that another process stored when it ended.

    Args:
      end_record: the other process's reason and exit code.
    """
    self.print_error(end_record["reason"])
    self.leave(end_record["code"], readers=self.count - ("lost" in end_record))

  def publish_end(self, end_record: dict) -> None:
    """Stores a reason and an exit code, with which all other processes then end too.

    Does nothing if another process has stored its own already.

    Args:
      end_record: reason and exit code.
    """
    try:
      self.client.key_value_set(END, json.dumps(end_record))
    except jax.errors.JaxRuntimeError:
      return  # a record is stored already, or process 0 is gone

  def leave(self, code: int, readers: int) -> NoReturn:
    """Ends this process with an exit code.

    Process 0 runs the key-value store, so it waits up to 5 s before it ends. In this time, the other
    processes read from the store why they must end.

    Args:
      code: exit code.
      readers: number of processes that process 0 waits for, itself included.
    """
    self.over.set()
    try:
      self.client.key_value_set(f"{ROOT}/left/{self.index}", "", allow_overwrite=True)
      until = time.monotonic() + 5
      while self.index == 0 and time.monotonic() < until:
        if len(self.client.key_value_dir_get(f"{ROOT}/left/")) >= readers:
          break
        time.sleep(0.1)
    except jax.errors.JaxRuntimeError:
      pass  # process 0 is gone, and the store with it
    # Not sys.exit: jax would wait at exit for all processes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain_aborts(group: Group, address: str) -> None:
  """Makes this process print that process 0 is lost, if jax aborts for that reason.

  If process 0 disappears, jax aborts this process at once, and its message does not name process 0.

  Args:
    group: processes of the run.
    address: address HOST:PORT on which process 0 listens.
  """
  libc = ctypes.CDLL(None)

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def on_abort(_) -> None:
    if group.index and (time.monotonic() - group.last_contact > 5 or not _listens(address)):
      group.end_lost(0)
    libc.signal(signal.SIGABRT, None)  # the default handler, so that the abort continues

  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
  group.on_abort = on_abort  # a reference, as ctypes keeps none


def _listens(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
  except OSError:
    return False
  return True
