"""Failure detection between the processes of a run: when one ends, all the others end.

A thread in each process watches the others through the key-value store of `jax.distributed`. A
process that failed writes an end record, with its reason and exit code, into the store; a process
that was killed sends no more heartbeats. In both cases the others print the name of that process
and exit at once.
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
"""Exit code after the loss of another process; as after SIGTERM, the same command resumes the run."""

ROOT, WATCH, END = "byolx", "byolx/watch/", "byolx/watch/end"
NO_TIMEOUT_MS = 10 * 24 * 3600 * 1000
"""Ten days in milliseconds: practically no time limit. If a process is lost, the watching thread
ends the wait much earlier."""


class Request(Protocol):
  """A request on which the watching threads agree, see `distributed.Soon`."""

  negotiating: bool

  def negotiate(self, entries: dict[str, str]) -> None:
    """Takes all entries of the store below WATCH."""


class Group:
  """The processes of a run, seen from this one, with the threads that watch the others.

  Args:
    client: client of jax's coordination service.
    index: index of this process, in 0 to count - 1.
    count: number of processes.
    peer_timeout: seconds without a heartbeat after which a process counts as lost.
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
    """Returns a process's name for messages, such as `process 1 (host-b)`."""
    return f"process {index} ({self.hosts[index]})"

  @property
  def prefix(self) -> str:
    """Beginning of this process's lines."""
    return f"process {self.index}: "

  def print_error(self, reason: str) -> None:
    """Prints why this process ends, to stderr."""
    print(f"byolx: error: {self.prefix}{reason}", file=sys.stderr, flush=True)

  def next_call(self, kind: str) -> int:
    """Returns the number of earlier calls of a kind, which every process makes in the same order."""
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
    """Detects the loss of process 0, which runs the store.

    It needs a thread of its own, as a call to the store may then never return to the other thread.
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
    """Ends this process because another process has published an end record."""
    self.print_error(end_record["reason"])
    self.leave(end_record["code"], readers=self.count - ("lost" in end_record))

  def publish_end(self, end_record: dict) -> None:
    """Stores why this process ends, for the others; does nothing if a record is already stored."""
    try:
      self.client.key_value_set(END, json.dumps(end_record))
    except jax.errors.JaxRuntimeError:
      return  # a record is stored already, or process 0 is gone

  def leave(self, code: int, readers: int) -> NoReturn:
    """Ends this process.

    Process 0, which runs the store, first waits up to 5 s for the others to read the end record.

    Args:
      code: exit code.
      readers: number of processes that read the end record, process 0 included.
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
  """Prints which process was lost before jax aborts.

  If process 0 disappears, jax aborts this process at once and without naming process 0.
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
