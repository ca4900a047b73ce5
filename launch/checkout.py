"""Finds the git commit to launch, and the address from which the machines of a TPU can clone it."""

import re
import subprocess
from pathlib import Path

from byolx.core.config import ConfigError


def git(root: Path, *arguments: str) -> str | None:
  """Runs a git command and returns its output without surrounding blanks; None if it fails.

  Args:
    root: root of the checkout.
    arguments: arguments of git, such as "status".

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
  """Returns the full hash of the commit to launch.

  Args:
    root: root of the checkout.
    revision: name of the commit, such as a branch; None for HEAD. With None, tracked files must not
      have changes, because only commits are launched.

  Raises:
    ConfigError: there is no such commit, or tracked files have changes that would not be launched.
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
  """Returns the git address from which the machines of a TPU can clone a commit.

  Args:
    root: root of the checkout.
    repo: address that the user gives; None for the address of the remote `origin`. With None, the
      commit must be on a remote branch.
    commit_hash: full hash of the commit.

  Raises:
    ConfigError: there is no address, the address has a user or a token in it or does not begin with
      https:// or file://, or the commit is on no remote branch.
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
  """Returns a config argument with the file's path relative to the root of the checkout.

  Args:
    root: root of the checkout.
    config: config file and its arguments, FILE[:ARGS].
    commit_hash: full hash of the commit that must contain the file.

  Raises:
    ConfigError: the file is outside the checkout or not in the commit.
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
  """Returns the git command that packs a commit into an archive.

  Args:
    root: root of the checkout.
    commit_hash: full hash of the commit.
    file: path of the archive to write, which ends in .tar.gz.
  """
  return ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={file}", commit_hash]
