"""What this machine offers."""

import os


def usable_cores() -> int:
  """CPU cores that this process may run on."""
  affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
  return len(affinity(0)) if affinity else os.cpu_count() or 1
