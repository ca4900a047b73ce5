"""`byolx prepare` stopped at any moment, by a kill or by a full disk, and started again."""

import contextlib
import fcntl
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import assert_same, crops, files_of, prepare_tree, run_prepare, write_tree

from byolx.data.prepare import collect, shards, write
from byolx.data.sources.prepared import prepared, verify

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tree(tmp_path):
  """Two classes of photographs, one of them broken."""
  root = write_tree(
    tmp_path / "photos", [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(12)]
  )
  (root / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
  return root


@pytest.fixture
def byolx(capsys):
  return functools.partial(run_prepare, capsys)


# Stopped and started again


def command(*arguments):
  return [sys.executable, "-m", "byolx", "prepare", *(str(argument) for argument in arguments)]


def run_on_its_own(*arguments, prefix=()):
  return subprocess.Popen(
    [*prefix, *command(*arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    start_new_session=True,
  )


def wait_for(condition, seconds=60.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.001)


def alive(group):
  """Processes of a process group that are not dead yet."""
  found = []
  for path in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
      if int(of_group) == group and state != "Z":
        found.append(path.parent.name)
  return found


def test_killed_at_any_moment_the_set_comes_out_the_same(byolx, tmp_path):
  """Five kills, three of them while shards are being written, and then a run to the end."""
  names = [f"{c}/{i:03d}.jpg" for c in "abc" for i in range(200)]
  source = write_tree(tmp_path / "src", names[:20], (560, 400))
  for i, name in enumerate(names[20:]):
    (source / name).parent.mkdir(exist_ok=True)
    shutil.copy(source / names[i % 20], source / name)
  (source / "a" / "broken.jpg").write_bytes(b"\xff\xd8 broken")
  options = ("--shards=20", "--short_side=100")
  assert byolx(f"--from={source}", f"--to={tmp_path / 'clean'}", *options, "--workers=1")[0] == 0
  to, rng, written = tmp_path / "set", random.Random(0), []
  progress = to / ".prepare"

  def count(pattern):
    return len(list(progress.glob(pattern)))

  for kill in range(5):
    finished = count("train*.json")
    process = run_on_its_own(f"--from={source}", f"--to={to}", *options, "--workers=2")
    if kill in (1, 2, 3):
      wait_for(lambda n=finished: count("train*.json") > n)
      wait_for(lambda: count("train*.array_record.*.tmp"))
    else:
      wait_for(progress.is_dir)
      time.sleep(rng.random())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda p=process: not alive(p.pid), 10)
    assert alive(process.pid) == []  # the workers do not outlive their parent
    written.append(len(list(to.glob("*.array_record"))))
    assert not (to / "dataset.json").exists()
  assert written == sorted(written)
  assert 3 <= written[-1] < 20
  assert count("*.tmp")
  noted = [to / note.stem for note in progress.glob("train*.json")]
  times = [path.stat().st_mtime_ns for path in noted]
  assert byolx(f"--from={source}", f"--to={to}", *options, "--workers=2")[0] == 0
  assert_same(tmp_path / "clean", to)
  assert [path.stat().st_mtime_ns for path in noted] == times
  assert verify(to, images=True) == []


def test_a_finished_shard_that_was_damaged_is_written_again(byolx, tree, tmp_path):
  to = tmp_path / "set"
  given = prepare_tree(tree, to, "--shards=4", "--workers=1")
  assert byolx(*given)[0] == 0
  shutil.copytree(to, tmp_path / "whole")
  collection = collect.collect(tree)
  cut = write._cut_all(collection, write.Options(shards=4))
  files = [f"train-{i:05d}-of-00004.array_record" for i in range(4)]
  for file, part in zip(files, cut["train"]):
    shards.write_shard(shards.Job(str(to), file, collection.splits["train"].take(part), None))
  (to / "dataset.json").unlink()
  data = bytearray((to / files[1]).read_bytes())
  data[500] ^= 4
  (to / files[1]).write_bytes(data)
  (to / files[2]).unlink()
  (to / ".prepare" / f"{files[3]}.json").write_text('{"shard": {"file": "tr')
  assert byolx(*given)[0] == 0
  assert_same(tmp_path / "whole", to)


def test_the_same_command_again_changes_nothing(byolx, tree, tmp_path):
  to = tmp_path / "set"
  given = prepare_tree(tree, to, "--workers=1")
  assert byolx(*given)[0] == 0
  before = {name: (to / name).stat().st_mtime_ns for name in files_of(to)}
  code, out, _ = byolx(*given, "--verify")
  assert code == 0
  assert f"{to} is prepared: train 24 records in 1 shard" in out
  assert f"verified {to}" in out
  assert {name: (to / name).stat().st_mtime_ns for name in files_of(to)} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_with_the_difference(byolx, tmp_path, finished):
  source = write_tree(tmp_path / "src", [f"{c}/{i}.jpg" for c in "ab" for i in range(3)])
  to = tmp_path / "set"
  assert byolx(f"--from={source}", f"--to={to}")[0] == 0
  if not finished:
    (to / "dataset.json").unlink()
  start = f"byolx: error: --to={to} holds a set of another plan ("
  end = "); choose another --to, or undo the change\n"
  code, _, err = byolx(f"--from={source}", f"--to={to}", "--shards=2", "--name=two")
  assert code == 2
  said = [line for line in err.splitlines(keepends=True) if line.startswith("byolx: error")]
  assert said == [f"{start}name: src -> two; splits.train.shards: 1 -> 2{end}"]
  code, _, err = byolx(f"--from={source}", f"--to={to}", "--short_side=100")
  assert code == 2
  assert "encode: None -> {'short_side': 100, 'quality': 95, " in err
  next(crops(1)).save(source / "b" / "9.jpg")
  code, _, err = byolx(f"--from={source}", f"--to={to}")
  assert code == 2
  assert "(splits.train.images: 6 -> 7; splits.train.bytes: " in err
  assert "; splits.train.names, sizes and labels changed); choose another --to" in err


def test_two_runs_at_once(byolx, tree, tmp_path):
  to = tmp_path / "set"
  given = prepare_tree(tree, to, "--workers=1")
  assert byolx(*given)[0] == 0
  folder = os.open(to / ".prepare", os.O_RDONLY)
  fcntl.flock(folder, fcntl.LOCK_EX)
  code, _, err = byolx(*given)
  os.close(folder)
  assert code == 2
  assert err.endswith(f"--to={to} is being written by another process\n")
  assert byolx(*given)[0] == 0


# A full disk


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(byolx, tmp_path, workers):
  """A limit on the size of files stands in for the disk: the third shard does not fit."""
  source = write_tree(tmp_path / "src", ["a.jpg", "b.jpg", "d.jpg"], (120, 90))
  noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
  Image.fromarray(noise).save(source / "c.png")
  given = (f"--from={source}", f"--to={tmp_path / 'set'}", "--shards=3")
  limit = 400_000
  process = run_on_its_own(*given, f"--workers={workers}", prefix=("prlimit", f"--fsize={limit}"))
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  (said,) = [line for line in err.splitlines() if line.startswith("byolx: error: ")]
  assert said.endswith(
    ": File too large; finished shards remain; run the same command again to continue"
  )
  assert "Traceback" not in err
  assert not list((tmp_path / "set" / ".prepare").glob("*.tmp"))
  assert list((tmp_path / "set").glob("*.array_record"))
  assert byolx(*given)[0] == 0
  assert len(prepared(tmp_path / "set", "train", 0.0)) == 4
