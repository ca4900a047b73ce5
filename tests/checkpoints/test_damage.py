"""Checkpoints that are damaged, cut off, too new, or that cannot be written."""

import json
import logging
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from byolx.checkpoints import storage
from byolx.checkpoints.manager import CheckpointError, Checkpoints, Policy
from byolx.core import sharding

ROOT = Path(__file__).parents[2]
FACTS = {"commit": "abc", "config": {"optim.base_rate": 0.2}}


def state_of(step):
  rng = np.random.default_rng(step)
  tree = {
    "kernel": rng.standard_normal((3, 3, 16, 32), dtype=np.float32),
    "half": rng.standard_normal((40, 7)).astype(jnp.bfloat16),
    "mask": rng.random(50) < 0.5,
    "step": np.int32(step),
    "many": {str(i): rng.standard_normal(5, dtype=np.float32) for i in range(20)},
  }
  return jax.device_put(tree, sharding.replicated(sharding.make_mesh(2)))


def shape_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


LIKE = shape_of(state_of(0))


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with the steps 10 and 20."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(folder)
  for step in (10, 20):
    checkpoints.save(step, state_of(step), {"next_example": 64 * step}, FACTS, {"loss": 1 / step})
  checkpoints.close()
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of it, to be damaged."""
  return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def as_saved(found):
  assert bits(found.state) == bits(state_of(found.step))
  assert found.data == {"next_example": 64 * found.step}
  assert found.meta == FACTS


def check_flips(folder, caplog, seed, flips=20):
  """One changed byte at a time, in any file of the newest checkpoint, and what comes of each."""
  rng = np.random.default_rng(seed)
  files = [path for path in files_of(folder / "20") if path.stat().st_size]
  outcomes = {"older": 0, "same": 0}
  for flip in range(flips):
    # Every file has its turn, the small ones too.
    path = files[flip % len(files)] if flip % 2 else files[rng.integers(len(files))]
    whole = path.read_bytes()
    place, change = int(rng.integers(len(whole))), int(rng.integers(1, 256))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    caplog.clear()
    found = Checkpoints(folder).restore(LIKE)
    as_saved(found)
    if found.step == 10:
      outcomes["older"] += 1
      (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
      assert said.startswith(f"the checkpoint of step 20 in {folder} is damaged: ")
      assert said.endswith("; trying the one of step 10")
      assert "\n" not in said
    else:
      assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
      outcomes["same"] += 1
    path.write_bytes(whole)
  assert Checkpoints(folder).restore(LIKE).step == 20
  return outcomes


def test_a_changed_byte_is_never_restored_silently(folder, caplog):
  outcomes = check_flips(folder, caplog, seed=0)
  assert outcomes["older"] >= 2  # of 20; the names of orbax's files, and so what is hit, vary


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 26))
def test_many_changed_bytes_are_never_restored_silently(folder, caplog, seed):
  outcomes = check_flips(folder, caplog, seed)
  print(outcomes)


def test_every_file_may_be_cut_or_missing(folder, caplog):
  needed = 0
  for path in files_of(folder / "20"):
    whole = path.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], None):
      path.unlink() if damage is None else path.write_bytes(damage)
      found = Checkpoints(folder).restore(LIKE)
      as_saved(found)
      needed += found.step == 10
      path.write_bytes(whole)
  assert needed > 10
  assert caplog.text.count("is damaged") == needed


@pytest.mark.parametrize("item", ["state", "record"])
def test_a_missing_item_is_damage(folder, caplog, item):
  shutil.rmtree(folder / "20" / item)
  as_saved(found := Checkpoints(folder).restore(LIKE))
  assert found.step == 10
  assert "step 20" in caplog.text


def test_a_step_that_is_asked_for_is_not_replaced(folder):
  shutil.rmtree(folder / "20" / "state")
  with pytest.raises(CheckpointError, match=r"^the checkpoint of step 20 in .* is damaged: "):
    Checkpoints(folder).restore(LIKE, 20)
  assert Checkpoints(folder).restore(LIKE, 10).step == 10


def test_an_empty_folder_is_damage_and_can_be_discarded(folder, caplog):
  (folder / "30").mkdir()
  checkpoints = Checkpoints(folder)
  assert checkpoints.latest() == 30
  assert checkpoints.restore(LIKE).step == 20
  assert "step 30" in caplog.text
  assert "record/record.json is missing; trying the one of step 20" in caplog.text
  checkpoints.discard_after(20)
  checkpoints.save(30, state_of(30), {"next_example": 64 * 30}, FACTS)
  checkpoints.close()
  as_saved(found := Checkpoints(folder).restore(LIKE))
  assert found.step == 30


def test_when_nothing_is_good_there_is_an_error(folder, caplog):
  for step in ("10", "20"):
    shutil.rmtree(folder / step / "state")
  with pytest.raises(CheckpointError, match=r"^none of 2 checkpoints in .* can be used$"):
    Checkpoints(folder).restore(LIKE)
  assert caplog.text.count("is damaged") == 2
  assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def rewrite(folder, **changes):
  """Another record with a right checksum."""
  path = folder / "record" / "record.json"
  record = json.loads(path.read_text())["record"] | changes
  text = json.dumps(record, separators=(",", ":"))
  path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "record": record}, indent=1))


def test_a_newer_format_is_refused_and_not_passed_over(folder, caplog):
  rewrite(folder / "20", format=storage.FORMAT + 1)
  with pytest.raises(CheckpointError, match=r"is of format 2; this version reads up to format 1$"):
    Checkpoints(folder).restore(LIKE)
  assert not caplog.records


def test_another_checksum_is_damage(folder, caplog):
  record = storage.read_record(folder / "20")
  record["arrays"]["kernel"][1] ^= 1
  rewrite(folder / "20", arrays=record["arrays"])
  assert Checkpoints(folder).restore(LIKE).step == 10
  assert "damaged: kernel: checksum mismatch; trying" in caplog.text


def test_another_model_is_refused_and_not_passed_over(folder, caplog):
  other = {name: leaf for name, leaf in LIKE.items() if name != "mask"}
  with pytest.raises(ValueError, match=r"^checkpoint of step 20 holds another model: mask is bool"):
    Checkpoints(folder).restore(other)
  assert not caplog.records


def test_files_that_may_not_be_read_are_no_damage(folder, monkeypatch, caplog):
  """Passing over them would throw good checkpoints away."""

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(Path, "read_bytes", refuse)
  with pytest.raises(CheckpointError, match=r"record\.json: Permission denied$"):
    Checkpoints(folder).restore(LIKE)
  assert not caplog.records


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from byolx.checkpoints.manager import Checkpoints, CheckpointError
from test_damage import FACTS, LIKE, state_of

checkpoints = Checkpoints(Path({folder!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # writes fail with EFBIG
blocked = checkpoints.save(30, state_of(30), {{"next_example": 1}}, FACTS)
try:
  checkpoints.{call}
except CheckpointError as error:
  print("error", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("steps", checkpoints.steps(), checkpoints.restore(LIKE).step)
checkpoints.save(30, state_of(30), {{"next_example": 64 * 30}}, FACTS)
checkpoints.close()
print("then", checkpoints.steps())
"""


@pytest.mark.parametrize("call", ["wait()", "save(40, state_of(40), {}, {})"])
def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(folder, call):
  """Files cannot grow beyond 2 kB, as on a full disk; then there is room again."""
  script = FULL.format(tests=str(ROOT / "tests" / "checkpoints"), folder=str(folder), call=call)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", script], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  error, steps, then = done.stdout.splitlines()
  assert error.startswith(f"error the checkpoint of step 30 could not be saved in {folder}: ")
  assert "File too large" in error or "EFBIG" in error
  assert error.endswith("; the last one is of step 20")
  assert steps == "steps [10, 20] 20"
  assert then == "then [20, 30]"
  assert sorted(path.name for path in folder.iterdir()) == ["20", "30"]
  as_saved(Checkpoints(folder).restore(LIKE))


def test_an_error_of_the_background_is_said_once(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path / "run", Policy(keep=3))
  checkpoints.save(1, state_of(1), {}, {})
  checkpoints.wait()

  def fail(path, text):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "write_text", fail)
    checkpoints.save(2, state_of(2), {}, {})
    with pytest.raises(CheckpointError) as raised:
      checkpoints.wait()
  assert str(raised.value) == (
    f"the checkpoint of step 2 could not be saved in {tmp_path / 'run'}: "
    "[Errno 28] No space left on device; the last one is of step 1"
  )
  checkpoints.wait()
  assert checkpoints.steps() == [1]
  checkpoints.save(2, state_of(2), {}, {})
  checkpoints.close()
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
  with pytest.raises(CheckpointError, match=r"could not be saved in .*; there is no earlier one$"):
    checkpoints.save(1, state_of(1), {}, {})
