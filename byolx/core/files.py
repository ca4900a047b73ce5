"""Atomic writes: a file is replaced as a whole, or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file, or leaves the old one unchanged if the write fails.

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
