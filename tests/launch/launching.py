"""What several tests of launchers need."""

import os
import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
  """Runs git as nobody in particular."""
  who = {"NAME": "a", "EMAIL": "a@b.c", "DATE": "2020-01-01T00:00:00Z"}
  env = {
    f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()
  }
  done = subprocess.run(
    ["git", "-C", str(folder), *arguments],
    env={**os.environ, **env, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip()
