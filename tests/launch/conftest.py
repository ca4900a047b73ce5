"""The launchers are scripts beside each other: their folder is on the path, as it is when one is run."""

import os
import stat
import sys
from pathlib import Path

import pytest
from launching import git

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))


@pytest.fixture
def root(tmp_path) -> Path:
  """A checkout with one commit, of which a remote branch knows."""
  folder = tmp_path / "checkout"
  (folder / "configs").mkdir(parents=True)
  configs = Path(__file__).resolve().parents[2] / "configs"
  for name in ("pretrain_imagenet.py", "quickstart.py"):
    (folder / "configs" / name).write_text((configs / name).read_text())
  git(folder, "init", "--quiet", "--initial-branch=main")
  git(folder, "add", ".")
  git(folder, "commit", "--quiet", "--message=all")
  git(folder, "remote", "add", "origin", "https://example.org/byolx.git")
  git(folder, "update-ref", "refs/remotes/origin/main", "HEAD")
  return folder


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Puts a Python or bash program on the PATH before all others."""
  folder = tmp_path / "bin"
  folder.mkdir()
  monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

  def add(name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

  return add
