"""Workdirs (output folders of runs): each belongs to one config, and its results name the commit."""

import functools
import subprocess
import time
from pathlib import Path

from ml_collections import ConfigDict

from byolx.core import distributed, files
from byolx.core.config import ConfigError
from byolx.core.version import VERSION
from byolx.runs import config


@functools.cache
def commit() -> str:
  """Returns the git commit of this code, followed by `+` if files were changed since the commit.

  Without git, returns the version of this package.
  """
  here = Path(__file__).parents[1]

  def git(*arguments: str) -> str:
    done = subprocess.run(
      ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return f"v{VERSION}"


SHARED_SECONDS = 60
"""Longest wait for a file that another process wrote, in seconds.

The file may appear late, because network storage caches the contents of folders.
"""


def claim(workdir: Path, cfg: ConfigDict) -> None:
  """Writes the config into the workdir, unless the workdir belongs to another config.

  Args:
    workdir: folder of the run.
    cfg: config of the run, with all fields.

  Raises:
    ConfigError: the workdir has a run with another config, or the processes of the run do not have the
      same config or do not share the workdir.
  """
  path = workdir / "config.json"
  changed = _changed(distributed.agree(config.to_json(cfg)), cfg)
  if changed:
    raise ConfigError(
      f"process 0 has another config ({changed}); give every process the same command"
    )
  if distributed.is_writer():
    changed = path.exists() and _changed(path.read_text(), cfg)
    if changed:
      raise ConfigError(
        f"--workdir={workdir} holds a run of another config ({changed}); "
        "choose another --workdir, or undo the change"
      )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, config.to_json(cfg))
  distributed.barrier("claim")
  deadline = time.monotonic() + SHARED_SECONDS
  while not path.exists():
    if time.monotonic() > deadline:
      raise ConfigError(
        f"--workdir={workdir}: config.json, which process 0 wrote, is not there; expected a folder "
        "that all processes share"
      )
    time.sleep(1)


def _changed(text: str, cfg: ConfigDict) -> str:
  return "; ".join(config.differences(config.flatten(config.from_json(text)), config.flatten(cfg)))
