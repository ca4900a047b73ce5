"""Atomic writes: a file is either replaced as a whole or left unchanged."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file; if the write fails, the old file is left unchanged.

  Args:
    path: file to write; its parent folders are created.
    content: bytes, or text that is encoded as UTF-8.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
