"""A workdir belongs to one config; and the commit that its results come from."""

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
  """The git commit of this code, with `+` where files are changed; the version where git is not."""
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
"""Until a file that one process wrote is seen by the others: network storage remembers for a while."""


def claim(workdir: Path, cfg: ConfigDict) -> None:
  """Makes the workdir this config's, or refuses one that holds another config's run.

  With several processes, also refuses to go on where they differ in config or workdir.
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
  until = time.monotonic() + SHARED_SECONDS
  while not path.exists():
    if time.monotonic() > until:
      raise ConfigError(
        f"--workdir={workdir}: config.json, which process 0 wrote, is not there; expected a folder "
        "that all processes share"
      )
    time.sleep(1)


def _changed(text: str, cfg: ConfigDict) -> str:
  return "; ".join(config.differences(config.flatten(config.from_json(text)), config.flatten(cfg)))
