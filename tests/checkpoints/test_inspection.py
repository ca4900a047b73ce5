"""`byolx inspect`: what a workdir holds, on one page."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from byolx import cli
from byolx.checkpoints import inspection, storage
from byolx.checkpoints.manager import CheckpointError, Checkpoints
from byolx.runs import config, schema

CONFIG = {**config.flatten(config.defaults()), "seed": 3, "optim.base_rate": 0.4, "views.size": 64}
LINEAGE = {
  "path": "elsewhere/checkpoints/7", "step": 7, "encoder": "target", "commit": "aaa111",
  "fingerprint": "f00d", "from": None,
}  # fmt: skip
META = {"commit": "c6887dc", "fingerprint": "0123456789ab", "config": CONFIG, "lineage": LINEAGE}


def inspect(path, **options):
  defaults, names = config.flatten(config.defaults()), list(schema.encoder_fields())
  return inspection.inspect(path, defaults, names, **options)


def state_of(step):
  rng = np.random.default_rng(step)
  kernel, bias = rng.standard_normal((3, 3, 8, 16), np.float32), rng.standard_normal(16, np.float32)
  return {
    "step": jnp.int32(step),
    "params": {
      "online": {"encoder": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}},
      "predictor": {"kernel": jnp.asarray(kernel[0])},
    },
    "opt_state": [jnp.zeros((3, 3, 8, 16))],
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("saved") / "run"
  checkpoints = Checkpoints(workdir / "checkpoints")
  for step in (1200, 2400):
    metrics = {"loss": 3.25 / step, "top1": 0.5, "norm_update": 1.0}
    checkpoints.save(step, state_of(step), {"next_example": 64 * step, "seed": 3}, META, metrics)
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_page_says_what_there_is(workdir):
  page = inspect(workdir)
  assert [(step.step, step.problem, step.verified) for step in page.steps] == [
    (1200, "", False), (2400, "", False),
  ]  # fmt: skip
  for step in page.steps:
    folder = workdir / "checkpoints" / str(step.step)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert step.bytes == sum(len(path.read_bytes()) for path in files)
    assert step.data == {"next_example": 64 * step.step, "seed": 3}
    assert step.metrics["loss"] == 3.25 / step.step
  assert page.parts == [
    ("opt_state", 1, 1152, ""), ("online encoder", 2, 1168, ""), ("predictor", 1, 384, ""),
    ("step", 1, 1, ""),
  ]  # fmt: skip
  assert page.changes == {
    "seed": [0, 3], "optim.base_rate": [0.2, 0.4], "views.size": [224, 64],
  }  # fmt: skip
  assert (page.commit, page.fingerprint, page.lineage) == ("c6887dc", "0123456789ab", LINEAGE)
  assert page.encoder == {name: CONFIG[name] for name in schema.encoder_fields()}
  assert not page.damaged


def test_the_text_is_one_page(workdir):
  said = inspect(workdir).text()
  lines = said.splitlines()
  assert len(lines) < 40
  assert max(map(len, lines)) <= 100 + len(str(workdir))
  for part in (
    "commit c6887dc, config 0123456789ab", "2,400", "0.001354", "online encoder", "1,168",
    "Encoder fields\nmodel: arch resnet50, width 1.0, ", "padding same", "bn_eps 1e-05",
    "\nviews: size 64, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)\n",
    "next_example 153600, seed 3", "optim.base_rate  0.4 (default 0.2)",
    "target encoder of elsewhere/checkpoints/7 (commit aaa111, config f00d)",
  ):  # fmt: skip
    assert part in said
  assert "DAMAGED" not in said
  assert "verified" not in said


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/1200"])
def test_a_checkpoint_alone_is_enough(workdir, where):
  page = inspect(workdir / where)
  assert [step.step for step in page.steps] == ([1200] if where[-1] == "0" else [1200, 2400])
  assert page.commit == "c6887dc"


def test_a_checkpoint_with_another_name_is_read(workdir):
  (workdir / "checkpoints" / "1200").rename(workdir / "best")
  (step,) = inspect(workdir / "best", verify=True).steps
  assert (step.step, step.verified) == (1200, True)


def test_arrays_are_read_only_to_verify(workdir, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(storage, "read_arrays", None)
    inspect(workdir)
  page = inspect(workdir, verify=True)
  assert [step.verified for step in page.steps] == [True, True]
  assert page.text().count("verified") == 2


def test_damage_is_said(workdir, capsys):
  kernel = np.asarray(state_of(2400)["params"]["online"]["encoder"]["kernel"]).tobytes()
  folder = workdir / "checkpoints" / "2400"
  hit = 0
  for path in folder.rglob("*"):
    if path.is_file() and kernel in (content := path.read_bytes()):
      path.write_bytes(content.replace(kernel, kernel[:-1] + bytes([kernel[-1] ^ 1])))
      hit += 1
  assert hit == 1
  assert cli.main(["inspect", str(workdir)]) == 0
  assert cli.main(["inspect", str(workdir), "--verify"]) == 1
  said = capsys.readouterr().out
  assert "DAMAGED: params.online.encoder.kernel: checksum mismatch" in said
  (folder / "record" / "record.json").unlink()
  assert cli.main(["inspect", str(workdir)]) == 1
  said = capsys.readouterr().out
  assert "DAMAGED: record/record.json is missing" in said
  assert "c6887dc" in said  # from the older one


def test_json_says_the_same(workdir, tmp_path, capsys):
  path = tmp_path / "new" / "page.json"
  assert cli.main(["inspect", str(workdir), f"--json={path}"]) == 0
  page = inspect(workdir)
  assert json.loads(path.read_text()) == json.loads(json.dumps(dataclasses.asdict(page)))
  assert capsys.readouterr().out == page.text() + "\n"


def test_where_there_is_nothing_there_is_an_error(tmp_path, capsys):
  for path in (tmp_path, tmp_path / "missing"):
    with pytest.raises(CheckpointError, match=f"{path}: expected a workdir, or a checkpoint"):
      inspect(path)
    assert cli.main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert said == f"byolx: error: {path}: expected a workdir, or a checkpoint\n"
