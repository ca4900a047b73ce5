"""The git checkout of a launch: its commit, and the address from which hosts clone it."""

import re
import subprocess
from pathlib import Path

from byolx.core.config import ConfigError


def git(root: Path, *arguments: str) -> str | None:
  """Output of a git command, stripped; None if the command fails.

  Raises:
    ConfigError: git is not installed.
  """
  try:
    done = subprocess.run(
      ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    raise ConfigError("git is not installed; it is needed to find the commit to launch") from None
  return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path, revision: str | None) -> str:
  """Full hash of a commit.

  Args:
    root: root of the checkout.
    revision: name of the commit; None: HEAD, of a checkout without changes.

  Raises:
    ConfigError: there is no such commit, or the checkout has changes that would not be launched.
  """
  commit_hash = git(root, "rev-parse", "--verify", "--quiet", f"{revision or 'HEAD'}^{{commit}}")
  if not commit_hash:
    raise ConfigError(f"--commit={revision or 'HEAD'}: expected a commit of {root}")
  if not revision and (changed := git(root, "status", "--porcelain", "--untracked-files=no")):
    files = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()[:3])
    raise ConfigError(
      f"changes are not committed ({files}), and only commits are launched; commit them, or give "
      "--commit=HEAD to launch without them"
    )
  return commit_hash


def source(root: Path, repo: str | None, commit_hash: str) -> str:
  """Address from which hosts can clone a commit.

  Args:
    root: root of the checkout.
    repo: address; None: that of the remote `origin`, one of whose branches must have the commit.
    commit_hash: full hash of the commit.

  Raises:
    ConfigError: there is no address, it has a user or a token in it, it is not https:// or file://,
      or `origin` does not have the commit.
  """
  address = repo or git(root, "config", "--get", "remote.origin.url")
  upload = "or --upload, which copies the commit from here"
  if not address:
    raise ConfigError(f"{root} has no remote origin; expected --repo=https://..., {upload}")
  if re.match(r"\w+://[^/]*@", address):
    raise ConfigError(
      f"--repo: the address has a user or a token in it; expected one without, {upload}"
    )
  if not re.match(r"(https|file)://", address):
    raise ConfigError(
      f"--repo={address}: expected https://..., because hosts have no keys, {upload}"
    )
  if not repo and not git(root, "branch", "--remotes", "--contains", commit_hash):
    raise ConfigError(f"commit {commit_hash[:12]} is on no remote branch; push it first, {upload}")
  return address


def relative_config(root: Path, config: str, commit_hash: str) -> str:
  """Config FILE[:ARGS] with the path of FILE relative to the root of the checkout.

  Raises:
    ConfigError: the file is not in the commit.
  """
  name, colon, arguments = config.partition(":")
  file = Path(name).resolve()
  if not file.is_relative_to(root.resolve()):
    raise ConfigError(f"--config={name}: expected a file in {root}, the checkout")
  path = file.relative_to(root.resolve()).as_posix()
  if git(root, "cat-file", "-e", f"{commit_hash}:{path}") is None:
    raise ConfigError(f"--config={name}: not in commit {commit_hash[:12]}; commit it first")
  return f"{path}{colon}{arguments}"


def archive_command(root: Path, commit_hash: str, file: str) -> list[str]:
  """Command that packs a commit into the .tar.gz archive `file`."""
  return ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={file}", commit_hash]
