"""Graceful stops: SIGTERM and Ctrl-C become a request to stop; a stopped run raises StoppedError."""

import contextlib
import signal
from typing import Any


class StoppedError(RuntimeError):
  """Raised when a signal has stopped a run or a sweep; the training done so far is saved.

  Args:
    signal_name: name of the signal, such as SIGTERM; empty if another process received it.
    progress: end of the error message: how far the run or the sweep has come, such as `after step
      10 of 20, which is saved`.
  """

  def __init__(self, signal_name: str, progress: str):
    super().__init__(f"stopped by {signal_name or 'another process'} {progress}")
    self.by_keyboard = signal_name == "SIGINT"


class Stop:
  """Context manager that turns the signals SIGTERM and SIGINT into a request to stop.

  A second signal of the same kind goes to the handler that was installed before. Outside of the
  main thread the context manager does nothing, because Python handles signals in the main thread
  only.

  Args:
    at_once: end of the message of a StoppedError, which is raised as soon as a signal arrives. If
      empty, no error is raised: the signal's name is stored in `name`, which the caller must check.

  Attributes:
    name: name of the last signal received, such as SIGTERM; empty if none has been received.
  """

  def __init__(self, at_once: str = ""):
    self.name = ""
    self._at_once = at_once
    self._previous_handlers: dict[int, Any] = {}

  def __enter__(self) -> "Stop":
    with contextlib.suppress(ValueError):  # raised outside of the main thread
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous_handlers[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous_handlers.items():
      signal.signal(number, handler)
    self._previous_handlers = {}

  def _request(self, number: int, _) -> None:
    self.name = signal.Signals(number).name
    signal.signal(number, self._previous_handlers.pop(number))
    if self._at_once:
      raise StoppedError(self.name, self._at_once)
