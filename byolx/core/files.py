"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a whole file or leaves the old one; makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
