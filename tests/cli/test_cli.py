"""The `byolx` command: help, and mistakes answered in one line before anything is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from byolx import cli
from byolx.runs import config, schema
from byolx.training import state, step

FIELDS = schema.fields()
ROOT = Path(__file__).parents[2]

COMMANDS = ["train", "eval", "sweep", "report", "plan", "show-views", "prepare", "bench", "fields"]

CONFIG = """
from ml_collections import ConfigDict

def get_config(batch=64):
  config = ConfigDict()
  config.data = {"source": "digits"}
  config.views = {"size": 8}
  config.model = {
    "arch": "custom", "blocks": (1,), "channels": (8,), "stem": "small", "stem_channels": 8
  }
  config.byol = {"projector_hidden": 16, "predictor_hidden": 16, "projection_size": 8}
  config.optim = {"warmup_epochs": 1}
  config.train = {"epochs": 2, "batch_size": batch}
  config.eval = {"resize": 8}
  return config
"""


@pytest.fixture
def tiny(tmp_path):
  """Path of a config that would train in seconds."""
  path = tmp_path / "tiny.py"
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def byolx(capsys):
  """Runs the command in this process: (exit code, stdout, stderr)."""

  def run(*arguments):
    try:
      code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
      code = stop.code
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def refused(byolx, monkeypatch):
  """Runs a command that must be refused: its one line on stderr."""

  def compiles(*args, **kwargs):
    raise AssertionError("got as far as compiling")

  monkeypatch.setattr(state, "initialiser", compiles)
  monkeypatch.setattr(step, "compile_step", compiles)

  def run(*arguments):
    code, out, err = byolx(*arguments)
    assert code == 2
    assert "compiling" not in out
    assert err.startswith("byolx: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("byolx: error: ").rstrip("\n")

  return run


def images(folder, count=6, size=12):
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    cv2.imwrite(str(folder / f"{i}.png"), np.full((size, size, 3), 2 * i, np.uint8))
  return folder


# Help


def test_help_lists_the_commands(byolx):
  code, out, err = byolx("--help")
  assert (code, err) == (0, "")
  for command in COMMANDS:
    assert f"\n    {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(byolx, command):
  code, out, err = byolx(command, "--help")
  assert (code, err) == (0, "")
  assert out.startswith(f"usage: byolx {command}")


def test_help_of_train_has_examples_that_load(byolx):
  out = byolx("train", "--help")[1]
  examples = [line.split() for line in out.splitlines() if line.startswith("  byolx train ")]
  assert len(examples) >= 3
  for words in examples:
    overrides = [word for word in words if word.startswith("--config.")]
    name = next(word for word in words if word.startswith("--config="))
    config.load(str(ROOT / name.removeprefix("--config=")), overrides)


def test_fields_lists_every_field(byolx):
  code, out, err = byolx("fields")
  assert (code, err) == (0, "")
  lines = out.splitlines()
  assert [line.split()[0] for line in lines] == list(FIELDS)
  for line, field in zip(lines, FIELDS.values(), strict=True):
    assert str(field.default) in line
    assert line.endswith(field.meaning)


def test_help_does_not_wait_for_jax():
  code = "import sys; from byolx import cli\ntry: cli.main(['train', '--help'])\nfinally: "
  code += "print([name for name in ('jax', 'flax', 'grain', 'cv2') if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0
  assert done.stdout.endswith("\n[]\n")


def test_module_is_the_command(tiny, tmp_path):
  """A real process: exit code, and nothing but the one line on stderr."""
  command = [
    sys.executable,
    "-m",
    "byolx",
    "train",
    f"--config={tiny}",
    "--config.optim.base_rat=1",
  ]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
  assert done.returncode == 2
  assert done.stdout == ""
  said = "byolx: error: unknown field optim.base_rat: did you mean optim.base_rate?\n"
  assert done.stderr == said


# Arguments


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "required: COMMAND; see byolx --help"),
    (["trian"], "'trian'"),
    (["train"], "required: --config; see byolx train --help"),
    (["train", "--config=x.py", "--workdri=here"], "unknown argument --workdri=here; see byolx tr"),
    (["train", "--config=x.py", "extra"], "unknown argument extra; see byolx train --help"),
    (
      ["train", "--config=x.py", "--config.seed", "3"],
      "--config.seed: expected --config.FIELD=VALU",
    ),
    (["train", "--config=x.py", "--seeds=0,x"], "--seeds: '0,x': expected different whole numbers"),
    (
      ["train", "--config=x.py", "--seeds=0,-1"],
      "--seeds: '0,-1': expected different whole numbers",
    ),
    (["train", "--config=x.py", "--seeds=1,1"], "--seeds: '1,1': expected different whole numbers"),
    (["eval"], "required: --from; see byolx eval --help"),
    (["eval", "--from=x", "--config.seed=1"], "unknown argument --config.seed=1; see byolx eval"),
    (
      ["show-views", "--config=x.py", "--images=0"],
      "--images: '0': expected a whole number of at l",
    ),
    (
      ["show-views", "--config=x.py", "--pairs=two"],
      "--pairs: 'two': expected a whole number of at",
    ),
    (["fields", "all"], "unknown argument all; see byolx fields --help"),
  ],
)
def test_wrong_arguments(refused, arguments, said):
  assert said in refused(*arguments)


# Configs


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    (["optim.base_rat=1"], "unknown field optim.base_rat: did you mean optim.base_rate?"),
    (["optim.base_rate=-0.2"], "optim.base_rate=-0.2: expected a finite number above 0"),
    (
      ["views.view2.crop_area=(0.08, 1.5)"],
      "views.view2.crop_area=(0.08, 1.5): expected two numbers in order, from 0.0001 to 1, the "
      "whole image",
    ),
    (
      ["views.size=16"],
      "eval.resize=8: the centre crop of views.size=16 is larger than the image; expected "
      "eval.resize of at least views.size",
    ),
    (
      ["train.batch_size=60"],
      "train.batch_size=60: expected a multiple of the mesh's 8 devices, such as 56 or 64; or set "
      "mesh.data",
    ),
    (
      ["train.micro_batch=4"],
      "train.micro_batch=4: expected a multiple of the mesh's 8 devices, such as 8; or set mesh.data",
    ),
    (["train.micro_batch=24"], "train.micro_batch=24: expected a divisor of train.batch_size=64"),
    (["model.bn_group=5"], "model.bn_group=5: expected a divisor of the 64 images of a pass"),
    (["mesh.data=9"], "mesh.data=9: expected at most the 8 devices there are"),
    (
      ["train.batch_size=2048"],
      "train.batch_size=2048: expected at most the 1437 training images of data.source=digits",
    ),
    (
      ["optim.warmup_epochs=5"],
      "train.epochs=2.0 with optim.warmup_epochs=5.0: 44 steps with 112 of warm-up; expected more "
      "steps than warm-up",
    ),
    (["model.channels=(8, 16)"], "expected one number per stage in each"),
    (["model.arch=resnet18"], "model.channels=(8,): only for model.arch=custom"),
    (
      ["model.arch=resnet51"],
      "model.arch='resnet51': expected one of resnet18, resnet34, resnet50, resnet101, resnet152, "
      "resnet200, custom",
    ),
  ],
)
def test_configs_that_cannot_run(refused, tiny, tmp_path, overrides, said):
  given = [f"--config.{override}" for override in overrides]
  workdir = tmp_path / "run"
  assert said in refused("train", f"--config={tiny}", f"--workdir={workdir}", *given)
  assert not workdir.exists()


def test_an_unknown_file_and_argument(refused, tiny, tmp_path):
  said = refused("train", f"--config={tmp_path / 'tini.py'}")
  assert said == f"--config={tmp_path / 'tini.py'}: no such file; there are: {tiny}"
  said = refused("train", f"--config={tiny}:bath=3")
  assert said == f"--config={tiny}:bath=3: unknown argument; it takes: batch=64"


# Folders


def folder_of(folder):
  return ["--config.data.source=image_folder", f"--config.data.folder={folder}"]


def test_a_missing_folder(refused, tiny, tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  said = refused("train", f"--config={tiny}", workdir, *folder_of(tmp_path / "photos"))
  assert said.startswith(
    f"data.folder is '{tmp_path / 'photos'}', which does not exist; expected a "
  )
  said = refused("train", f"--config={tiny}", workdir, *folder_of(""))
  assert said.startswith(
    "data.folder is '', which does not exist; expected a folder with one subfo"
  )
  said = refused("train", f"--config={tiny}", workdir, *folder_of(tiny))
  assert said.startswith(f"data.folder is '{tiny}', which is not a folder; expected a folder with ")


def test_a_folder_without_images(refused, tiny, tmp_path):
  empty = tmp_path / "photos"
  empty.mkdir()
  (empty / "list.txt").write_text("none")
  said = refused("train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *folder_of(empty))
  assert said.startswith(f"data.folder is '{empty}', whose train split has no image (0 found")
  assert ".jpg" in said


def test_more_images_to_a_batch_than_there_are(refused, tiny, tmp_path):
  folder = images(tmp_path / "photos", 20)
  said = refused("train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *folder_of(folder))
  assert said == (
    "train.batch_size=64: expected at most the 16 training images of data.source=image_folder"
  )


def test_a_folder_of_which_no_image_can_be_read(refused, tiny, tmp_path):
  folder = tmp_path / "photos"
  folder.mkdir()
  for i in range(20):
    (folder / f"{i}.jpg").write_text("no image")
  arguments = [f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=8", *folder_of(folder)]
  said = refused("train", f"--config={tiny}", *arguments)
  assert said.startswith(f"data.folder={folder}: none of 16 images tried can be read, such ")
  assert "not a JPEG, PNG, WebP or BMP file" in said


def test_fashion_mnist_that_is_not_installed(refused, tiny, tmp_path):
  given = ["--config.data.source=fashion_mnist", f"--config.data.folder={tmp_path}"]
  said = refused("train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *given)
  assert "does not exist; install the package dataset-fashion-mnist" in said


# Workdirs


def test_a_workdir_of_another_config(refused, tiny, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text(config.to_json(config.load(tiny)))
  given = ["--config.train.epochs=3", "--config.byol.tau_base=0.9", "--config.log.every_steps=1"]
  said = refused("train", f"--config={tiny}", f"--workdir={workdir}", *given)
  assert said == (
    f"--workdir={workdir} holds a run of another config (byol.tau_base: 0.996 -> 0.9; "
    "train.epochs: 2.0 -> 3.0); choose another --workdir, or undo the change"
  )


def test_a_workdir_that_is_a_file(byolx, tiny, tmp_path):
  file = tmp_path / "run"
  file.write_text("")
  code, _, err = byolx("train", f"--config={tiny}", f"--workdir={file}")
  assert code == 1
  assert err.count("\n") == 1
  assert err.startswith("byolx: error: ")
  assert str(file) in err


def test_eval_of_what_is_no_workdir(refused, tiny, tmp_path):
  said = refused("eval", f"--from={tmp_path}")
  assert said == f"--from={tmp_path}: expected a workdir of `byolx train`, with a config.json"
  (tmp_path / "config.json").write_text(config.to_json(config.load(tiny)))
  said = refused("eval", f"--from={tmp_path}")
  assert said == f"--from={tmp_path}: expected a checkpoint in {tmp_path / 'checkpoints'}"


# Views


def test_show_views_writes_a_picture(byolx, tiny, tmp_path):
  output = tmp_path / "new" / "views.png"
  given = [f"--output={output}", "--images=3", "--pairs=2", "--config.views.size=16"]
  code, out, err = byolx("show-views", f"--config={tiny}", *given)
  assert (code, err) == (0, "")
  assert out == f"wrote {output}\n"
  sheet = cv2.imread(str(output))
  # Views of 16 pixels are enlarged to cells of 96; an original and four views in each of three rows,
  # 6 pixels between all, 6 more between pairs, and a line of labels.
  assert sheet.shape == (24 + 3 * (96 + 6), 6 + 5 * (96 + 6) + 2 * 6, 3)


def test_show_views_is_spread_over_the_images(byolx, tiny, tmp_path):
  folder = images(tmp_path / "photos", 100)
  given = [f"--output={tmp_path / 'v.png'}", "--images=4", "--pairs=1", *folder_of(folder)]
  code, _, _ = byolx("show-views", f"--config={tiny}", "--config.data.test_share=0.01", *given)
  assert code == 0
  sheet = cv2.imread(str(tmp_path / "v.png"))
  shown = [int(sheet[24 + row * 102 + 48, 6 + 48, 0]) for row in range(4)]
  assert shown == sorted(set(shown))
  assert shown[0] <= 2 * 5
  assert shown[-1] >= 2 * 75
