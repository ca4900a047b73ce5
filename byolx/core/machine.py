"""What this machine offers, and how its processes end."""

import multiprocessing
import os
import threading


def usable_cores() -> int:
  """CPU cores that this process may run on."""
  affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def end_with_parent() -> None:
  """Makes this worker process end when the process that started it does, however that ended.

  A process that is killed tells nobody: its workers would wait for ever, and hold shared memory.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent) -> None:
  parent.join()
  os._exit(1)
