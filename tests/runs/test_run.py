"""Whole runs with a tiny network on digits: what a workdir holds, going on, stopping, bad images."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from byolx import cli
from byolx.checkpoints import manager
from byolx.runs import config, experiment
from byolx.runs import fit as fitting
from byolx.runs.workdir import claim

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("compiled")

# 1437 images to train on: 14.97 steps per epoch, 89 steps, 7 of them warm-up.
CONFIG = """
from ml_collections import ConfigDict

def get_config():
  view = {"jitter_probability": 0.0, "blur_probability": 0.0, "flip_probability": 0.0}
  config = ConfigDict()
  config.data = {"source": "digits"}
  config.views = {"size": 8, "view1": dict(view), "view2": dict(view)}
  config.model = {
    "arch": "custom", "blocks": (1,), "channels": (16,), "stem": "small", "stem_channels": 8
  }
  config.byol = {
    "projector_hidden": 32, "predictor_hidden": 32, "projection_size": 16, "tau_base": 0.99
  }
  config.optim = {"base_rate": 0.5, "warmup_epochs": 0.5}
  config.train = {"epochs": 6, "batch_size": 96}
  config.checkpoint = {"every_epochs": 1}
  config.log = {"every_steps": 5}
  config.eval = {"resize": 8, "fractions": (0.1, 1.0), "draws": 2}
  config.mesh = {"data": 1}
  return config
"""
STEPS, WARMUP, PER_EPOCH = 89, 7, 1437 / 96

# A run whose log takes its time, so that it can be killed in the middle on any machine.
SLOW = """
import sys, time
from byolx import cli
from byolx.runs import metrics_log
write = metrics_log.RunLog.write
def slowly(*arguments):
  time.sleep(0.3)
  write(*arguments)
metrics_log.RunLog.write = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


class Done(NamedTuple):
  """A command that ended."""

  code: int
  out: str
  err: str


def byolx(*arguments):
  """Runs the command in this process."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = cli.main([str(argument) for argument in arguments])
  return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  path = tmp_path_factory.mktemp("configs") / "tiny.py"
  path.write_text(CONFIG)
  return f"--config={path}"


@pytest.fixture(scope="module")
def seeds(tiny, tmp_path_factory):
  """Two finished runs, one per seed: the folder of both, and what was said."""
  folder = tmp_path_factory.mktemp("runs") / "tiny"
  done = byolx("train", tiny, "--seeds=0,1", f"--workdir={folder}")
  assert done.code == 0
  return folder, done


@pytest.fixture(scope="module")
def workdir(seeds):
  """A finished run of seed 0."""
  return seeds[0] / "seed_0"


def fit(cfg, workdir):
  """A run without its evaluation: what was said."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
    claim(workdir, cfg)
    fitting.fit(experiment.build(cfg), workdir)
  return out.getvalue()


def rows(workdir):
  """metrics.jsonl, without the one number that is a matter of time."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert all(row.pop("images_per_second") > 0 for row in found)
  return found


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def load(tiny, *overrides):
  return config.load(tiny.removeprefix("--config="), [f"--config.{one}" for one in overrides])


def restored(cfg, workdir):
  """The newest checkpoint: its step and all its arrays by path."""
  exp = experiment.build(cfg)
  abstract = exp.abstract_state
  checkpoints = manager.Checkpoints(workdir / "checkpoints")
  state = checkpoints.restore(abstract).state
  checkpoints.close()
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return int(state.step), {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


# A finished run


def test_everything_is_in_the_workdir(workdir, tiny):
  names = {path.name for path in workdir.iterdir()}
  assert names >= {
    "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "results.json",
    "curves.png", "views.png", "embedding.png",
  }  # fmt: skip
  assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]
  cfg = config.from_json((workdir / "config.json").read_text())
  assert config.flatten(cfg) == config.flatten(load(tiny))
  assert sum(path.stat().st_size for path in (workdir / "tensorboard").iterdir()) > 1000
  # Whole epochs are saved, and the end; the last two are kept.
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["75", "89"]


@pytest.mark.parametrize("name", ["curves.png", "views.png", "embedding.png"])
def test_pictures_show_something(workdir, name):
  picture = cv2.imread(str(workdir / name))
  assert min(picture.shape[:2]) > 200
  assert picture.std() > 5


def test_rows_of_metrics(workdir, tiny):
  found = rows(workdir)
  assert [row["step"] for row in found] == [*range(5, STEPS, 5), STEPS]
  expected = {
    "step", "epoch", "loss", "loss_byol", "loss_probe", "top1", "std", "rank", "tau", "rate",
    "norm_representation", "norm_projection", "norm_gradient", "norm_update",
  }  # fmt: skip
  step = np.array([row["step"] for row in found])
  for row in found:
    assert set(row) == expected
    assert np.isfinite(list(row.values())).all()
    assert row["loss"] == pytest.approx(row["loss_byol"] + row["loss_probe"], rel=1e-5)
  column = {name: np.array([row[name] for row in found]) for name in expected}
  np.testing.assert_allclose(column["epoch"], step / PER_EPOCH, atol=1e-4)
  # Appendix A: k counts from 0, and a row's step from 1.
  k, peak = step - 1, 0.5 * 96 / 256
  cosine = peak * (1 + np.cos(np.pi * (k - WARMUP) / (STEPS - WARMUP))) / 2
  rate = np.where(k < WARMUP, peak * k / WARMUP, cosine)
  np.testing.assert_allclose(column["rate"], rate, rtol=1e-4, atol=1e-7)
  tau = 1 - (1 - 0.99) * (np.cos(np.pi * k / STEPS) + 1) / 2
  np.testing.assert_allclose(column["tau"], tau, atol=1e-6)


def test_records_of_results(workdir, tiny):
  found = results(workdir)
  for record in found:
    assert set(record) == {
      "task", "protocol", "encoder", "labels", "split", "metric", "value", "interval", "n", "seed",
      "step", "config", "commit",
    }  # fmt: skip
    assert 0 < record["value"] <= 1
    assert (record["task"], record["split"], record["metric"]) == ("pretrain", "test", "top1")
    assert (record["seed"], record["step"]) == (0, STEPS)
    assert record["config"] == config.fingerprint(load(tiny))
    assert record["commit"]
    assert record["n"] == (2 if record["labels"] == 0.1 else 1)
  named = {(record["protocol"], record["encoder"], record["labels"]) for record in found}
  encoders = ("online", "target", "random", "pixels")
  solved = {(p, e, f) for p in ("linear", "knn") for e in encoders for f in (0.1, 1.0)}
  assert named == solved | {("online_probe", "online", 1.0)}
  assert len(found) == len(named)
  # Raw digits are easy, chance is 0.1, and a network this small keeps about half.
  value = {(r["protocol"], r["encoder"], r["labels"]): r["value"] for r in found}
  assert value["linear", "pixels", 1.0] > 0.9
  assert value["knn", "pixels", 1.0] > 0.95
  assert value["linear", "online", 1.0] > 0.3


def test_a_run_says_what_it_does_and_found(seeds):
  out, err = seeds[1].out, seeds[1].err
  assert "steps     89 of 96 images, 6 epochs" in out
  assert "1,437 for training, 360 held out (digits, 10 classes)" in out
  assert out.index("workdir") < out.index("the step")
  assert "step 89/89  epoch 5.9" in err
  table = out[out.rindex("Mean over seeds 0, 1") :]
  for encoder in ("online", "target", "random", "pixels"):
    assert f"\n{encoder} " in table


def test_means_over_seeds(seeds):
  folder, _ = seeds
  of_seed = [results(folder / f"seed_{seed}") for seed in (0, 1)]
  found = results(folder)
  assert found[: -len(of_seed[0])] == of_seed[0] + of_seed[1]
  means = found[-len(of_seed[0]) :]
  for mean, first, second in zip(means, *of_seed, strict=True):
    assert mean["seed"] == [0, 1]
    assert mean["value"] == pytest.approx((first["value"] + second["value"]) / 2)
    assert mean["interval"] == pytest.approx(abs(first["value"] - second["value"]) / 2)
    same = ("protocol", "encoder", "labels", "step", "config")
    assert [mean[key] for key in same] == [first[key] for key in same]
  assert of_seed[0] != [record | {"seed": 0} for record in of_seed[1]]


# Going on


def test_eval_gives_the_same_results(workdir):
  before = results(workdir)
  (workdir / "embedding.png").unlink()
  done = byolx("eval", f"--from={workdir}")
  assert done.code == 0
  assert "compiling the step" not in done.out
  assert results(workdir) == before
  assert (workdir / "embedding.png").exists()


def test_a_finished_run_is_not_trained_again(workdir, tiny):
  before, state = rows(workdir), restored(load(tiny), workdir)
  said = fit(load(tiny), workdir)
  assert "going on from step 89 of 89" in said
  assert "compiling the step" not in said
  assert rows(workdir) == before
  same_state(restored(load(tiny), workdir), state)


def test_a_finished_run_of_other_epochs_is_another_run(workdir, tiny):
  before = (workdir / "config.json").read_text()
  done = byolx("train", tiny, f"--workdir={workdir}", "--config.train.epochs=7")
  assert done.code == 2
  assert "holds a run of another config (train.epochs: 6.0 -> 7.0)" in done.err
  assert (workdir / "config.json").read_text() == before


def same_state(found, expected):
  assert found[0] == expected[0]
  assert found[1].keys() == expected[1].keys()
  for name, value in expected[1].items():
    np.testing.assert_array_equal(found[1][name], value, err_msg=name)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(workdir, tiny, compiled, tmp_path):
  """kill -9 between two checkpoints, then the same command: equal to the bit in every array."""
  killed = tmp_path / "killed"
  arguments = [sys.executable, "-c", SLOW, "train", tiny, f"--workdir={killed}"]
  environment = os.environ | compiled | {"PYTHONPATH": str(ROOT)}
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  with subprocess.Popen(arguments, env=environment, cwd=tmp_path, **quiet) as process:
    while not saved(killed):
      assert process.poll() is None, "ended before its first checkpoint"
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  last = max(saved(killed))
  assert 0 < last < STEPS
  cfg = load(tiny)
  assert f"going on from step {last} of 89" in fit(cfg, killed)
  same_state(restored(cfg, killed), restored(cfg, workdir))
  assert rows(killed) == rows(workdir)


def saved(workdir):
  """Steps of the checkpoints that are whole."""
  return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]


# Stopping


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tiny, tmp_path):
  overrides = ["optim.name=sgd", "optim.base_rate=1e30", "checkpoint.every_epochs=0.01"]
  given = [f"--config.{override}" for override in overrides]
  done = byolx("train", tiny, f"--workdir={tmp_path}", *given)
  assert done.code == 1
  said = done.err.splitlines()[-1]
  assert said.startswith("byolx: error: step ")
  assert "expected finite numbers. The last good checkpoint is kept; try a lower" in said
  assert "Traceback" not in done.err
  step, arrays = restored(load(tiny, *overrides), tmp_path)
  assert f"error: step {step + 1}: " in said
  assert all(np.isfinite(x).all() for name, x in arrays.items() if x.dtype.kind == "f")
  assert [row["step"] for row in rows(tmp_path)] == list(range(5, step + 1, 5))
  assert not (tmp_path / "results.json").exists()


def test_collapse_is_seen_and_said(tiny, workdir, tmp_path):
  """With predictor and target nothing collapses; without both everything does (Table 19)."""
  healthy = [row["std"] for row in rows(workdir)]
  assert min(healthy) > 0.5
  for seed in (0, 1):
    cfg = load(tiny, "byol.predictor=False", "byol.target=online", f"seed={seed}")
    said = fit(cfg, tmp_path / str(seed))
    found = rows(tmp_path / str(seed))
    assert found[0]["std"] > 0.4
    assert found[-1]["std"] < 0.1
    # The loss alone looks like success.
    assert found[-1]["loss_byol"] < 0.1 * rows(workdir)[-1]["loss_byol"]
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "the vectors collapse towards a point: normalised std 0." in warnings[0]


def test_no_warning_without_collapse(seeds):
  assert "warning" not in seeds[1].out


# Folders of images

FOLDER = [
  "--config.model.arch=custom", "--config.model.blocks=(1,)", "--config.model.channels=(8,)",
  "--config.model.stem_channels=8", "--config.byol.projector_hidden=16",
  "--config.byol.predictor_hidden=16", "--config.byol.projection_size=8", "--config.mesh.data=1",
]  # fmt: skip


IMAGE_FOLDER = f"{ROOT / 'configs' / 'image_folder.py'}:size=12,epochs=3,batch=4"


def load_folder(folder):
  return config.load(IMAGE_FOLDER, [*FOLDER, f"--config.data.folder={folder}"])


def image_folder(folder, workdir, *overrides):
  given = [f"--config={IMAGE_FOLDER}", *FOLDER, f"--config.data.folder={folder}", *overrides]
  return byolx("train", *given, f"--workdir={workdir}")


def photographs(folder, count, seed=0):
  """Pieces of a photograph, JPEG and PNG."""
  folder.mkdir(parents=True)
  whole, rng = load_sample_image("flower.jpg"), np.random.default_rng(seed)
  for i in range(count):
    top, left = rng.integers(0, 350), rng.integers(0, 550)
    piece = Image.fromarray(whole[top : top + 60, left : left + 80])
    piece.save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")


def test_a_folder_of_badly_behaved_images(tmp_path, caplog):
  """Files that cannot be read are named once in the whole run; odd ones are trained on."""
  folder = tmp_path / "photos"
  photographs(folder / "a", 8)
  photographs(folder / "b", 8, seed=1)
  whole = Image.fromarray(load_sample_image("flower.jpg"))
  whole.save(folder / "a" / "whole.jpg")
  data = (folder / "a" / "whole.jpg").read_bytes()
  bad = {folder / "a" / "cut.jpg": data[: len(data) // 2], folder / "b" / "empty.png": b""}
  bad[folder / "b" / "text.jpg"] = b"this is no image"
  for path, content in bad.items():
    path.write_bytes(content)
  whole.convert("CMYK").save(folder / "a" / "cmyk.jpg")
  whole.convert("LA").save(folder / "a" / "grey_alpha.png")
  whole.resize((1, 1)).save(folder / "b" / "one.png")
  Image.fromarray(np.zeros((8000, 10, 3), np.uint8)).save(folder / "b" / "tall.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  whole.save(folder / "b" / "turned.jpg", exif=exif)

  # Without the online probe this is the very program of the test below, 15 steps of 4 images.
  given = ["--config.data.max_failed_share=0.5", "--config.byol.probe_weight=0"]
  done = image_folder(folder, tmp_path / "run", *given)
  assert done.code == 0
  warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  for path in bad:
    assert sum(str(path) in warning for warning in warnings) == 1
  assert len(warnings) == len(bad)
  found = results(tmp_path / "run")
  assert {record["encoder"] for record in found} == {"online", "target", "random", "pixels"}
  assert all(0 <= record["value"] <= 1 for record in found)


def test_images_without_labels(tmp_path):
  photographs(tmp_path / "photos", 25)
  done = image_folder(tmp_path / "photos", tmp_path / "run")
  assert done.code == 0
  assert "20 for training, 5 held out (image_folder, 0 classes)" in done.out
  assert "no labels: nothing to measure" in done.out
  assert results(tmp_path / "run") == []
  assert "top1" not in rows(tmp_path / "run")[-1]
  for name in ("curves.png", "views.png", "embedding.png"):
    assert cv2.imread(str(tmp_path / "run" / name)).std() > 5


def test_a_folder_that_changed_is_another_run(tmp_path):
  """Checked before any array is read: a class more is a column more of the online probe."""
  folder, workdir = tmp_path / "photos", tmp_path / "run"
  photographs(folder / "a", 5)
  photographs(folder / "b", 5)
  exp = experiment.build(load_folder(folder))
  claim(workdir, exp.config)
  checkpoints = manager.Checkpoints(workdir / "checkpoints")
  state = exp.initialise()
  checkpoints.save(2, state, fitting.data_position(exp, 2), {})
  checkpoints.close()
  photographs(folder / "c", 5)
  for done in (image_folder(folder, workdir), byolx("eval", f"--from={workdir}")):
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
      "byolx: error: the checkpoint of step 2 was trained on other images (images: 8 -> 12; "
      "classes: 2 -> 3); choose another --workdir, or bring the images of data.folder back"
    )


def test_too_many_unreadable_images_stop_a_run(tmp_path):
  photographs(tmp_path / "photos", 10)
  for i in range(5):
    (tmp_path / "photos" / f"bad{i}.jpg").write_bytes(b"")
  given = "--config.data.max_failed_share=0"
  done = image_folder(tmp_path / "photos", tmp_path / "run", given)
  assert done.code == 1
  said = done.err.splitlines()[-1]
  assert said.startswith("byolx: error: image_folder: ")
  assert " records seen cannot be read, the last one being " in said
  assert said.endswith("expected at most a share of data.max_failed_share = 0.0")
  assert "Traceback" not in done.err
