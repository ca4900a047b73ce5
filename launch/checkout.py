"""The git checkout that is launched from: which commit, and where hosts get it."""

import re
import subprocess
from pathlib import Path

from byolx.core.config import ConfigError


def git(root: Path, *arguments: str) -> str | None:
  """What git prints, or None where it fails."""
  try:
    done = subprocess.run(
      ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    raise ConfigError("git is not installed; it tells which commit to launch") from None
  return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path, given: str | None) -> str:
  """The full hash of a commit; without one given, of HEAD, if nothing is changed since.

  Raises:
    ConfigError: no such commit, or changes that would not be launched.
  """
  found = git(root, "rev-parse", "--verify", "--quiet", f"{given or 'HEAD'}^{{commit}}")
  if not found:
    raise ConfigError(f"--commit={given or 'HEAD'}: expected a commit of {root}")
  if not given and (changed := git(root, "status", "--porcelain", "--untracked-files=no")):
    files = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()[:3])
    raise ConfigError(
      f"changes are not committed ({files}), and only commits are launched; commit them, or say "
      "--commit=HEAD to launch without them"
    )
  return found


def source(root: Path, given: str | None, wanted: str) -> str:
  """The address from which hosts clone a commit, which has to be there.

  Raises:
    ConfigError: there is none, it holds a secret, hosts cannot use it, or the commit is not there.
  """
  address = given or git(root, "config", "--get", "remote.origin.url")
  private = "or --upload, which copies the commit from here"
  if not address:
    raise ConfigError(f"{root} has no remote origin; expected --repo=https://..., {private}")
  if re.match(r"\w+://[^/]*@", address):
    raise ConfigError(
      f"--repo: the address has a user or a token in it; expected one without, {private}"
    )
  if not re.match(r"(https|file)://", address):
    raise ConfigError(f"--repo={address}: expected https://..., as hosts have no keys, {private}")
  if not given and not git(root, "branch", "--remotes", "--contains", wanted):
    raise ConfigError(f"commit {wanted[:12]} is on no remote branch; push it first, {private}")
  return address


def relative_config(root: Path, given: str, wanted: str) -> str:
  """FILE[:ARGS] as seen from the root of the checkout.

  Raises:
    ConfigError: the file is not in the commit.
  """
  name, colon, arguments = given.partition(":")
  file = Path(name).resolve()
  if not file.is_relative_to(root.resolve()):
    raise ConfigError(f"--config={name}: expected a file in {root}, from where it is launched")
  path = file.relative_to(root.resolve()).as_posix()
  if git(root, "cat-file", "-e", f"{wanted}:{path}") is None:
    raise ConfigError(f"--config={name}: not in commit {wanted[:12]}; commit it first")
  return f"{path}{colon}{arguments}"


def archive_command(root: Path, wanted: str, file: str) -> list[str]:
  """The command that packs a commit."""
  return ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={file}", wanted]
