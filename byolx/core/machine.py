"""Number of usable CPU cores, and the end of worker processes whose parent process has ended."""

import multiprocessing
import os
import threading


def usable_cores() -> int:
  """Returns the number of CPU cores that this process may run on."""
  affinity = getattr(os, "sched_getaffinity", None)  # missing on macOS
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def end_with_parent() -> None:
  """Makes this worker process end as soon as its parent process has ended, for any reason.

  Without this, the workers of a killed parent would wait for ever and hold their shared memory.
  Does nothing in a process that `multiprocessing` did not start.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent) -> None:
  parent.join()
  os._exit(1)
