"""byolx.load_encoder: the function that was trained, in one line, without the data set."""

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits
from tiny import config_text

import byolx
from byolx import cli
from byolx.core import sharding
from byolx.core.config import ConfigError
from byolx.data.sources.base import ArraySource
from byolx.evaluation import inference
from byolx.runs import config, experiment, fit, rollbacks
from byolx.runs.images import Sources

ROOT = Path(__file__).parents[2]
MODEL = {"padding": "torch", "bn_eps": 0.1, "blocks": (1, 1), "channels": (8, 16)}


@pytest.fixture(scope="module")
def run(compiled, tmp_path_factory):
  """A run on a folder of PNGs, which is gone afterwards; its held-out images and their features."""
  folder = tmp_path_factory.mktemp("load")
  digits = load_digits()
  for i in range(240):
    path = folder / "images" / str(digits.target[i]) / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    large = cv2.resize((digits.images[i] * 15.9).astype(np.uint8), (20, 14))
    cv2.imwrite(str(path), large)
  text = config_text(
    data={"source": "image_folder", "folder": str(folder / "images")},
    model=MODEL,
    views={"mean": (0.2, 0.3, 0.4), "std": (0.3, 0.4, 0.5)},
    eval={"resize": 10},
    train={"epochs": 2.0, "batch_size": 32},
    mesh={"cpu_devices": 1, "data": 1},
  )
  (folder / "config.py").write_text(text)
  workdir = folder / "run"
  assert cli.main(["train", f"--config={folder / 'config.py'}", f"--workdir={workdir}"]) == 0
  exp = experiment.build(config.of_run(workdir))
  checkpoints = fit.manager.Checkpoints(workdir / "checkpoints")
  model = fit.restore(exp, checkpoints, rollbacks.Rollbacks(workdir)).model()
  source = exp.sources.held_out[1]
  images = [source[i].image for i in range(len(source))]
  encoders = {"online": model.online.encoder, "target": model.target.encoder}
  measured, _, _ = inference.features(
    encoders, exp.normalise, exp.evaluation_batches(source), exp.mesh
  )
  shutil.rmtree(folder / "images")
  return workdir, images, measured


@pytest.mark.parametrize("which", ["online", "target"])
def test_features_are_those_that_results_were_measured_on(run, which):
  workdir, images, measured = run
  encoder = byolx.load_encoder(workdir, which)
  assert (encoder.features, encoder.size) == (16, 8)
  prepared = encoder.prepare(images)
  assert prepared.shape == (len(images), 8, 8, 3)
  np.testing.assert_allclose(encoder(prepared), measured[which], rtol=0, atol=1e-6)


def test_in_another_process_whose_data_folder_is_gone(run, tmp_path):
  workdir, images, measured = run
  np.savez(tmp_path / "images.npz", *images)
  code = (
    "import sys, numpy as np, byolx\n"
    "images = list(np.load(sys.argv[2]).values())\n"
    "encoder = byolx.load_encoder(sys.argv[1])\n"
    "np.save(sys.argv[3], encoder(encoder.prepare(images)))\n"
    "assert 'grain' not in sys.modules and 'sklearn' not in sys.modules\n"
  )
  files = [str(workdir), str(tmp_path / "images.npz"), str(tmp_path / "features.npy")]
  environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code, *files], check=True, env=environment, cwd=tmp_path)
  np.testing.assert_allclose(np.load(files[2]), measured["online"], rtol=0, atol=1e-6)


def test_from_a_bare_checkpoint_on_any_mesh_with_maps(run, tmp_path):
  workdir, images, measured = run
  newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  shutil.copytree(newest, tmp_path / "alone")
  encoder = byolx.load_encoder(tmp_path / "alone", mesh=sharding.make_mesh(4))
  prepared = encoder.prepare(images)
  np.testing.assert_allclose(encoder(prepared), measured["online"], rtol=0, atol=1e-6)
  stem, *maps = encoder.stages(prepared[:3])
  assert [x.shape for x in (stem, *maps)] == [(3, 8, 8, 8), (3, 8, 8, 8), (3, 4, 4, 16)]
  np.testing.assert_allclose(maps[-1].mean((1, 2)), measured["online"][:3], rtol=0, atol=1e-6)
  # It is an NNX module like any other.
  graphdef, state = nnx.split(encoder)
  again = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, prepared)
  np.testing.assert_allclose(again, measured["online"], rtol=0, atol=1e-6)


def test_what_is_not_images_or_not_there_is_refused(run, tmp_path):
  encoder = byolx.load_encoder(run[0])
  for images in (np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
    with pytest.raises(ValueError, match=r"expected uint8\[n, height, width, 3\]"):
      encoder(images)
  with pytest.raises(ConfigError, match="it has: online, target"):
    byolx.load_encoder(run[0], "teacher")
  with pytest.raises(Exception, match="expected a workdir, or a checkpoint"):
    byolx.load_encoder(tmp_path)


class OwnNetwork(nnx.Module):
  """An encoder written with flax's own layers."""

  def __init__(self, rngs):
    self.features = 12
    self.conv = nnx.Conv(3, 12, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(12, momentum=0.9, rngs=rngs)

  def __call__(self, x, *, train, views=1):
    del views
    x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
    return x.mean((1, 2))


def test_ones_own_network_and_images_are_trained_and_loaded(compiled, tmp_path):
  digits = load_digits()
  images = (digits.images * 15.9).astype(np.uint8)
  labels, classes = digits.target.astype(np.int32), tuple("0123456789")
  train = ArraySource("mine", images[:600], labels[:600], classes)
  test = ArraySource("mine", images[600:700], labels[600:700], classes)
  fields = {
    "views": {"size": 8},
    "byol": {"projector_hidden": 16, "predictor_hidden": 16, "projection_size": 8},
    "optim": {"base_rate": 0.3, "warmup_epochs": 0.5},
    "train": {"epochs": 2.0, "batch_size": 64},
    "eval": {"resize": 8, "fractions": (1.0,)},
  }
  records = byolx.train(fields, tmp_path, images=Sources(train, None, test), network=OwnNetwork)
  assert {"online", "target", "random", "pixels"} == {record["encoder"] for record in records}
  assert {record["split"] for record in records} == {"test"}
  encoder = byolx.load_encoder(tmp_path, network=OwnNetwork)
  assert encoder(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 12)
  with pytest.raises(ConfigError, match="its encoder is another network"):
    byolx.load_encoder(tmp_path)
  # Kernels decay, vectors do not: roles by shape, in the printed table too.
  exp = experiment.build(
    config.of_run(tmp_path), images=Sources(train, None, test), network=OwnNetwork
  )
  from byolx.runs import summary

  (line,) = (x for x in summary.parameter_table(exp).splitlines() if x.startswith("encoder "))
  assert "36 in 3" in line


def test_a_network_that_does_not_say_its_features_is_refused(tmp_path):
  class Silent(nnx.Module):
    def __init__(self, rngs):
      self.weight = nnx.Param(np.zeros(3, np.float32))

  images = ArraySource("mine", np.zeros((8, 8, 8), np.uint8), np.zeros(8, np.int32), ("a", "b"))
  fields = {"views": {"size": 8}, "train": {"epochs": 20.0, "batch_size": 8}, "eval": {"resize": 8}}
  with pytest.raises(ConfigError, match="Silent has no attribute `features`"):
    byolx.train(fields, tmp_path, images=Sources(images, None, images), network=Silent)
