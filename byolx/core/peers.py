"""The other processes of a run: no process outlives one of them.

A thread in each watches the others through the key-value store of `jax.distributed`: one that
failed leaves a note with its reason and exit code, and one that was killed stops giving signs of
life. Either way the others say which process it was, and end, whatever they were doing.
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
"""Exit code where another process was lost: as after SIGTERM, the same command goes on."""

ROOT, WATCH, END = "byolx", "byolx/watch/", "byolx/watch/end"
EVER = 10 * 24 * 3600 * 1000
"""Milliseconds; the watching thread ends a wait for a process that is gone long before."""


class Meeting(Protocol):
  """What the watching threads settle among themselves, see `distributed.Soon`."""

  meeting: bool

  def attend(self, entries: dict[str, str]) -> None:
    """Called with all entries of the store below WATCH."""


class Group:
  """This process among the others.

  Args:
    client: of the coordination service.
    index, count: this process, and how many there are.
    peer_timeout: as for `initialise`.
  """

  def __init__(self, client: Any, index: int, count: int, peer_timeout: float):
    self.client, self.index, self.count, self.peer_timeout = client, index, count, peer_timeout
    self.calls: dict[str, int] = {}
    self.soons: dict[str, Meeting] = {}
    self.over = threading.Event()
    self.heard = time.monotonic()
    client.key_value_set(f"{ROOT}/host/{index}", socket.gethostname(), allow_overwrite=True)
    client.wait_at_barrier(f"{ROOT}/start", EVER)
    self.hosts = [client.blocking_key_value_get(f"{ROOT}/host/{i}", EVER) for i in range(count)]
    self.threads = [
      threading.Thread(target=target, daemon=True) for target in (self._watch, self._watch_store)
    ]
    for thread in self.threads:
      thread.start()

  def name(self, index: int) -> str:
    """As `process 1 (its host)`."""
    return f"process {index} ({self.hosts[index]})"

  @property
  def prefix(self) -> str:
    """What this process's lines begin with."""
    return f"process {self.index}: "

  def say(self, reason: str) -> None:
    """Why this process ends."""
    print(f"byolx: error: {self.prefix}{reason}", file=sys.stderr, flush=True)

  def next_call(self, kind: str) -> int:
    """Numbers the calls of a kind, which every process makes in the same order."""
    self.calls[kind] = self.calls.get(kind, -1) + 1
    return self.calls[kind]

  def _watch(self) -> None:
    beats = 0
    seen: dict[int, tuple[str, float]] = {}
    while not self.over.wait(0.05 if any(soon.meeting for soon in self.soons.values()) else 1.0):
      beats += 1
      try:
        self.client.key_value_set(f"{WATCH}alive/{self.index}", str(beats), allow_overwrite=True)
        entries = dict(self.client.key_value_dir_get(WATCH))
        for soon in list(self.soons.values()):
          soon.attend(entries)
      except jax.errors.JaxRuntimeError:
        continue
      now = self.heard = time.monotonic()
      if END in entries and not self.over.is_set():
        self.end_with(json.loads(entries[END]))
      for other in range(self.count):
        beat = entries.get(f"{WATCH}alive/{other}", "")
        if seen.get(other, ("none", 0.0))[0] != beat:
          seen[other] = beat, now
        elif now - seen[other][1] > self.peer_timeout:
          self.end_lost(other)

  def _watch_store(self) -> None:
    """The store, which is process 0, may fall silent in the middle of a call that has no limit."""
    while not self.over.wait(1.0):
      if time.monotonic() - self.heard > self.peer_timeout:
        self.end_lost(0)

  def end_lost(self, lost: int) -> NoReturn:
    """Ends this process because that one gave no sign of life."""
    reason = (
      f"{self.name(lost)} is lost; without it the others stop, and the same command on every host "
      "goes on from the last checkpoint"
    )
    self.say(reason)
    if lost == 0:
      os._exit(EXIT_LOST)  # nobody to tell, and a call to the store might never return
    self.leave_note({"lost": lost, "code": EXIT_LOST, "reason": reason})
    self.leave(EXIT_LOST, readers=self.count - 1)

  def end_with(self, note: dict) -> NoReturn:
    """Ends this process because another one did."""
    self.say(note["reason"])
    self.leave(note["code"], readers=self.count - ("lost" in note))

  def leave_note(self, note: dict) -> None:
    """Tells the others why this process ends; the first note stands."""
    try:
      self.client.key_value_set(END, json.dumps(note))
    except jax.errors.JaxRuntimeError:
      return  # there is one already, or nobody to read it

  def leave(self, code: int, readers: int) -> NoReturn:
    """Ends this process; process 0 waits until so many, itself included, have read why."""
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
    # Not sys.exit: jax would wait for all processes to leave in good order.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain_aborts(group: Group, address: str) -> None:
  """Adds a line to jax's: it aborts at once, and without a name, where process 0 disappears."""
  libc = ctypes.CDLL(None)

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def on_abort(_) -> None:
    if group.index and (time.monotonic() - group.heard > 5 or not _listens(address)):
      group.end_lost(0)
    libc.signal(signal.SIGABRT, None)  # as it is without this: the abort goes on

  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
  group.on_abort = on_abort  # ctypes forgets it otherwise


def _listens(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
  except OSError:
    return False
  return True
