"""Stopping in good order: SIGTERM and Ctrl-C as a request, and the error that says it was followed."""

import contextlib
import signal
from typing import Any


class StoppedError(RuntimeError):
  """A run that was asked to stop by a signal, and has saved what it had.

  Args:
    signal_name: empty where another process had the signal.
    what: was stopped, and saved.
  """

  def __init__(self, signal_name: str, what: str):
    super().__init__(f"stopped by {signal_name or 'another process'} {what}")
    self.by_keyboard = signal_name == "SIGINT"


class Stop:
  """Turns SIGTERM and SIGINT into a request, while used as a context manager in the main thread.

  A second signal of the same kind acts as it would without this.

  Args:
    at_once: what to say in a StoppedError that is raised wherever the signal comes; empty to
      leave it to who looks at `name`.
  """

  def __init__(self, at_once: str = ""):
    self.name = ""
    self._at_once = at_once
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Stop":
    with contextlib.suppress(ValueError):  # not in the main thread: nothing to listen to
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _request(self, number: int, _) -> None:
    self.name = signal.Signals(number).name
    signal.signal(number, self._before.pop(number))
    if self._at_once:
      raise StoppedError(self.name, self._at_once)
