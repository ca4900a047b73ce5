"""Every file in configs/: it loads, holds the paper's values, and describes what can be built."""

import ast
import dataclasses
import importlib.util
import inspect
from pathlib import Path

import jax
import pytest
from flax import nnx

from byolx.core.config import ConfigError
from byolx.data.augment import distribution
from byolx.data.augment.randaugment import RandAugment
from byolx.runs import config, schema, trainer
from byolx.training import optimizers, state
from byolx.training.task import Setting

FIELDS = schema.fields()
ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.joinpath("configs").glob("*.py"))
IMAGENET, PLACES365 = 1_281_167, 1_803_460

# Table 6: T, T'.
TABLE_6 = {
  "crop_probability": (1.0, 1.0),
  "flip_probability": (0.5, 0.5),
  "jitter_probability": (0.8, 0.8),
  "brightness": (0.4, 0.4),
  "contrast": (0.4, 0.4),
  "saturation": (0.2, 0.2),
  "hue": (0.1, 0.1),
  "grayscale_probability": (0.2, 0.2),
  "blur_probability": (1.0, 0.1),
  "solarise_probability": (0.0, 0.2),
  # Appendix C, in words.
  "crop_area": ((0.08, 1.0),) * 2,
  "crop_aspect": ((3 / 4, 4 / 3),) * 2,
  "blur_sigma": ((0.1, 2.0),) * 2,
}

# What all pretraining of the paper shares: appendices A and C.
APPENDIX_A = {
  "task": "pretrain",
  "data.validation": "none",
  "views.size": 224,
  "views.mean": (0.485, 0.456, 0.406),
  "views.std": (0.229, 0.224, 0.225),
  "model.arch": "resnet50",
  "model.width": 1.0,
  "model.stem": "imagenet",
  "model.stem_channels": 64,
  "model.bn_decay": 0.9,
  "model.bn_eps": 1e-5,
  "model.bn_group": 0,
  "model.dtype": "float32",
  "byol.projector_hidden": 4096,
  "byol.predictor_hidden": 4096,
  "byol.projection_size": 256,
  "byol.projector_depth": 2,
  "byol.predictor_depth": 2,
  "byol.predictor": True,
  "byol.target": "ema",
  "byol.tau_rule": "cosine",
  "byol.directions": "sum",
  "optim.name": "lars",
  "optim.momentum": 0.9,
  "optim.trust": 1e-3,
  "optim.warmup_epochs": 10.0,
  "optim.exclude": True,
  "train.micro_batch": 0,
  "eval.resize": 256,
}


def hyperparameters(batch, epochs, base_rate, weight_decay, tau_base):
  return {
    "train.batch_size": batch,
    "train.epochs": epochs,
    "optim.base_rate": base_rate,
    "optim.weight_decay": weight_decay,
    "byol.tau_base": tau_base,
  }


# File and arguments -> what the paper, or its authors' code, trains with.
PAPER = {
  "pretrain_imagenet.py": hyperparameters(4096, 1000, 0.2, 1.5e-6, 0.996),
  "pretrain_imagenet.py:epochs=1000": hyperparameters(4096, 1000, 0.2, 1.5e-6, 0.996),
  "pretrain_imagenet.py:epochs=300": hyperparameters(4096, 300, 0.3, 1e-6, 0.99),
  "pretrain_imagenet.py:epochs=100": hyperparameters(4096, 100, 0.45, 1e-6, 0.99),
  "pretrain_imagenet.py:epochs=40": hyperparameters(4096, 40, 0.45, 1e-6, 0.97),
  "pretrain_imagenet_b512.py": hyperparameters(512, 1000, 0.4, 1.5e-6, 0.9995),
  "pretrain_places365.py": hyperparameters(4096, 1000, 0.2, 1.5e-6, 0.996),
}


TRAINED = {
  "pretrain": {"online", "predictor", "probe"},
  "linear": {"heads"},
  "finetune": {"encoder", "heads"},
  "supervised": {"encoder", "heads"},
}

# Appendix D, and what protocols.md adds to it.
IMAGENET_EVALUATION = {
  "views.size": 224,
  "eval.resize": 256,
  "eval.crop_rule": "paper",
  "optim.name": "sgd",
  "optim.momentum": 0.9,
  "optim.schedule": "cosine",
  "optim.batch_scaling": True,
  "model.arch": "resnet50",
  "model.width": 1.0,
  "classify.tclip": 0.0,
  "classify.logit_penalty": 0.0,
}
LINEAR = {
  **IMAGENET_EVALUATION,
  "task": "linear",
  "train.epochs": 80.0,
  "train.batch_size": 1024,
  "optim.rates": (0.4, 0.3, 0.2, 0.1, 0.05),
  "optim.weight_decay": 0.0,
  "optim.warmup_epochs": 0.0,
  "classify.label_smoothing": 0.0,
  "classify.views": "spatial",
}
FINETUNE = {
  **LINEAR,
  "task": "finetune",
  "train.epochs": 30.0,
  "optim.rates": (),
  "data.source": "imagenet",
  "data.validation": "last_10009",
}
EVALUATION = {
  "linear_imagenet.py": {
    **LINEAR, "data.source": "imagenet", "data.validation": "last_10009"
  },
  "linear_imagenet.py:views=pretrain,tclip=20,penalty=0.01": {
    **LINEAR,
    "classify.views": "pretrain",
    "classify.tclip": 20.0,
    "classify.logit_penalty": 0.01,
  },
  "linear_places365.py": {**LINEAR, "data.source": "places365", "data.validation": "share"},
  "semi_supervised_imagenet.py": FINETUNE,
  "semi_supervised_imagenet.py:labels=0.1,rate=0.005,epochs=50": {
    **FINETUNE, "data.labels": 0.1, "optim.base_rate": 0.005, "train.epochs": 50.0
  },
  "supervised_imagenet.py": {
    **IMAGENET_EVALUATION,
    "task": "supervised",
    "data.source": "imagenet",
    "train.epochs": 200.0,
    "optim.base_rate": 0.1,
    "optim.weight_decay": 1e-4,
    "optim.warmup_epochs": 5.0,
    "classify.label_smoothing": 0.1,
    "classify.views": "randaugment",
    "classify.randaugment.operations": 2,
    "classify.randaugment.magnitude": 9.0,
    "classify.randaugment.bins": 31,
  },
}  # fmt: skip


def load(name):
  return config.load(str(ROOT / "configs" / name))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request):
  return request.param


def signature(file):
  """Names and defaults of the arguments of a file's get_config."""
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {p.name: p.default for p in inspect.signature(module.get_config).parameters.values()}


# Every file


def test_a_file_imports_only_ml_collections(file):
  imported = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add(node.module)
  assert imported == {"ml_collections"}


def test_a_file_begins_with_its_command(file):
  doc = ast.get_docstring(ast.parse(file.read_text()))
  assert f"byolx train --config=configs/{file.name}" in doc
  if file.name.startswith("pretrain_"):
    for part in ("Cost (paper)", "Result (paper; this config was not run here)", "Deviations"):
      assert f"\n{part}" in doc


def test_a_file_loads_without_arguments(file):
  cfg = load(file.name)
  config.check(cfg)
  assert set(config.flatten(cfg)) == set(FIELDS)


def test_every_argument_can_be_given(file):
  arguments = signature(file)
  spelt = ",".join(f"{name}={default}" for name, default in arguments.items())
  assert config.flatten(load(f"{file.name}:{spelt}")) == config.flatten(load(file.name))
  with pytest.raises(ConfigError, match="unknown argument; it takes: ") as caught:
    load(f"{file.name}:no_such_argument=1")
  assert all(f"{name}={default}" in str(caught.value) for name, default in arguments.items())


def test_a_file_describes_something_that_can_be_built(file):
  cfg = load(file.name)
  setting = Setting(cfg, trainer.build_encoder(cfg), classes=10, steps=1000)
  task = trainer.build_task(cfg, setting)
  params = state.abstract_untrained(task).params
  optimizer = optimizers.OptimizerSpec(**cfg.optim)
  rate, tx = optimizer.build(params, cfg.train.batch_size, steps=1000, warmup_steps=100)
  assert {path[0] for path, _ in nnx.to_flat_state(params)} == TRAINED[cfg.task]
  momenta = [x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.ndim]
  assert momenta == [x.shape for x in jax.tree.leaves(params)]
  peak = ([*cfg.optim.rates] or [cfg.optim.base_rate])[0] * cfg.train.batch_size / 256
  assert float(rate(100)) == pytest.approx(peak, rel=1e-6)
  assert float(rate(0)) == 0.0
  assert float(rate(1000)) == pytest.approx(0.0, abs=1e-6 * peak)
  trainer.build_input(cfg, classes=10)


# The paper's


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name):
  flat = config.flatten(load(name))
  for field, value in (APPENDIX_A | PAPER[name]).items():
    assert flat[field] == value, field
  for field, (first, second) in TABLE_6.items():
    assert flat[f"views.view1.{field}"] == first, field
    assert flat[f"views.view2.{field}"] == second, field


@pytest.mark.parametrize("name", EVALUATION)
def test_values_of_protocols_are_those_of_appendix_d(name):
  flat = config.flatten(load(name))
  for field, value in EVALUATION[name].items():
    assert flat[field] == value, field
  for field, (first, _) in TABLE_6.items():
    assert flat[f"views.view1.{field}"] == first, field


@pytest.mark.parametrize(
  "name", ["linear_imagenet.py", "linear_places365.py", "semi_supervised_imagenet.py"]
)
def test_protocols_of_imagenet_take_the_network_from_the_encoder(name, tmp_path):
  encoder = config.defaults()
  encoder.model.update(arch="resnet200", width=2.0, dtype="bfloat16", padding="torch")
  encoder.views.size = 192
  (tmp_path / "config.json").write_text(config.to_json(encoder))
  given = [f"--config.init.workdir={tmp_path}"]
  for arguments in ("", ":arch=resnet200,width=2"):
    cfg = config.load(f"{ROOT}/configs/{name}{arguments}", given)
    assert config.flatten(cfg.model) == config.flatten(encoder.model)
    assert (cfg.views.size, cfg.eval.resize) == (192, 256)
  with pytest.raises(
    ConfigError, match=r"\(model\.arch: 'resnet50', but the encoder has 'resnet200'\)"
  ):
    config.load(f"{ROOT}/configs/{name}:arch=resnet50", given)
  # Without an encoder, as for `byolx plan`, the arguments say it.
  cfg = load(f"{name}:arch=resnet101,width=3")
  assert (cfg.model.arch, cfg.model.width) == ("resnet101", 3.0)


def test_all_files_named_after_the_paper_are_checked():
  named = {file.name for file in FILES if file.stem.endswith(("imagenet", "b512", "places365"))}
  assert named == {name.partition(":")[0] for name in PAPER | EVALUATION}


def test_views_of_classifiers():
  (spatial,) = trainer.build_input(load("linear_imagenet.py"), 10).specs
  (pretrain,) = trainer.build_input(load("linear_imagenet.py:views=pretrain"), 10).specs
  (randaugment,) = trainer.build_input(load("supervised_imagenet.py"), 10).specs
  assert pretrain == distribution.ViewSpec()
  off = ("jitter", "grayscale", "blur", "solarise")
  assert all(getattr(spatial, f"{name}_probability") == 0 for name in off)
  assert (spatial.flip_probability, spatial.crop_area) == (0.5, (0.08, 1.0))
  assert randaugment == dataclasses.replace(spatial, randaugment=RandAugment(2, 9.0, 31))


def test_places365_trains_as_imagenet_does():
  imagenet, places = load("pretrain_imagenet.py"), load("pretrain_places365.py")
  assert (imagenet.data.source, places.data.source) == ("imagenet", "places365")
  places.data.source = "imagenet"
  assert config.flatten(imagenet) == config.flatten(places)


def test_other_epochs_are_refused_with_the_choices():
  with pytest.raises(ConfigError, match=r"epochs=200: expected one of 40, 100, 300, 1000"):
    load("pretrain_imagenet.py:epochs=200")


def test_arguments_of_the_papers_networks():
  cfg = load("pretrain_imagenet.py:arch=resnet200,width=2,batch=1024")
  assert (cfg.model.arch, cfg.model.width, cfg.train.batch_size) == ("resnet200", 2.0, 1024)
  spec = trainer.build_encoder(cfg)
  assert spec.stages.blocks == (3, 24, 36, 3)
  assert spec.stages.channels == (512, 1024, 2048, 4096)
  # The base rate is per 256 images, so it stays.
  assert cfg.optim.base_rate == load("pretrain_imagenet.py").optim.base_rate


@pytest.mark.parametrize(
  ("name", "images", "steps", "warmup"),
  [
    # Appendix J.1: int(1000. * 1281167 / 4096), int(10. * 1281167 / 4096).
    ("pretrain_imagenet.py", IMAGENET, 312_784, 3127),
    ("pretrain_places365.py", PLACES365, 440_297, 4402),
    ("pretrain_imagenet_b512.py", IMAGENET, 2_502_279, 25_022),
  ],
)
def test_steps_are_those_of_appendix_j(name, images, steps, warmup):
  found = trainer.count_steps(load(name), images)
  assert found == (steps, warmup)


# A folder of one's own


@pytest.mark.parametrize("size", [16, 32, 63, 64, 128, 224, 256])
@pytest.mark.parametrize("epochs", [1, 5, 100, 1000])
def test_any_size_and_length_of_image_folder_goes_together(size, epochs):
  cfg = load(f"image_folder.py:size={size},epochs={epochs},batch=8")
  assert cfg.views.size == size <= cfg.eval.resize
  assert cfg.optim.warmup_epochs < cfg.train.epochs
  assert cfg.checkpoint.every_epochs <= cfg.train.epochs
  assert cfg.model.stem == ("imagenet" if size >= 64 else "small")
  if size == 224:
    assert cfg.eval.resize == 256
  steps, warmup = trainer.count_steps(cfg, images=10)
  assert 0 <= warmup < steps
