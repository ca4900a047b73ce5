"""Configs of the paper say in their docstrings in which fields they differ from it, and in no others."""

import ast
import itertools
import re
from pathlib import Path

import pytest

from byolx.core.config import ConfigError
from byolx.reports.paper import OneOf, settings
from byolx.runs import config, schema

FIELDS = schema.fields()
ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
CONFIGS = ROOT / "configs"
NAME = re.compile(r"`([a-z]+(?:\.[a-z0-9_]+)+)`")
NETWORKS = [
  {"arch": f"resnet{depth}", "width": width}
  for depth, width in itertools.product((50, 101, 152, 200), (1, 2, 3, 4))
]
SMALL_BATCH = {"train.batch_size": 512, "optim.base_rate": 0.4, "byol.tau_base": 0.9995}
LINEAR_PLACES = {**settings.LINEAR}
LINEAR = {**settings.LINEAR, **settings.LOCAL_VALIDATION}
VARIATION = {"classify.tclip": OneOf((0.0, 20.0)), "classify.logit_penalty": OneOf((0.0, 0.01))}
# Appendix D.1's classifier is trained on all images.
ALL_IMAGES = {"eval.max_train": 0}


def product(**choices):
  """Every combination of arguments."""
  return [
    dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
  ]


def crossed(*grids):
  return [
    dict(itertools.chain(*(part.items() for part in parts))) for parts in itertools.product(*grids)
  ]


# File: the protocols of the paper that its arguments choose between, and arguments.
FILES = {
  "pretrain_imagenet.py": (
    [settings.MAIN | ALL_IMAGES, settings.ABLATIONS | ALL_IMAGES],
    crossed(
      NETWORKS, product(epochs=(1000, 300, 100, 40), batch=(4096, 1024), cores=(0, 32, 128, 512))
    ),
  ),
  "pretrain_imagenet_b512.py": ([settings.MAIN | SMALL_BATCH | ALL_IMAGES], NETWORKS),
  "pretrain_places365.py": ([settings.MAIN | ALL_IMAGES], NETWORKS),
  "linear_imagenet.py": (
    [LINEAR | VARIATION, LINEAR | VARIATION | settings.PRETRAINING_VIEWS],
    crossed(NETWORKS, product(views=("spatial", "pretrain")),
            [{}, {"tclip": 20, "penalty": 0.01}]),
  ),
  "linear_places365.py": ([LINEAR_PLACES], NETWORKS),
  "semi_supervised_imagenet.py": (
    [settings.SEMI_SUPERVISED],
    crossed(
      NETWORKS[:3],
      product(labels=(0.01, 1.0), rate=(0.01, 0.02, 0.05, 0.1, 0.005, 0.2), epochs=(30, 50, 60)),
    ),
  ),
  "supervised_imagenet.py": (
    [settings.SUPERVISED],
    crossed(NETWORKS, product(epochs=(200, 90), views=("randaugment", "spatial"))),
  ),
}  # fmt: skip
# What a file sets where neither the paper nor its authors' code says anything.
OURS = {
  "linear_imagenet.py": {"classify.views"},
  "linear_places365.py": {"data.validation", "data.validation_share"},
}


def parts(file):
  """The fields that a docstring names as deviations, and as not stated in the paper."""
  doc = ast.get_docstring(ast.parse((CONFIGS / file).read_text()))
  _, found, rest = doc.partition("\nDeviations from the paper")
  assert found, "expected a part `Deviations from the paper`"
  deviations, found, unstated = rest.partition("\nNot stated in the paper")
  assert found, "expected a part `Not stated in the paper`, after the deviations"
  return set(NAME.findall(deviations)), set(NAME.findall(unstated))


def task_of(file):
  return config.load(str(CONFIGS / file)).task


def differing(flat, protocol, task):
  """Fields that are neither the paper's nor, where it does not state them, the shipped values."""
  wanted = {**settings.LEFT_OPEN[task], **protocol}
  different = set()
  for name, value in wanted.items():
    choices = value.values if isinstance(value, OneOf) else (value,)
    if name in flat and flat[name] not in choices:
      different.add(name)
  return different


def deviations(file):
  """Over all arguments: where a config differs from the nearest of the paper's protocols."""
  protocols, grid = FILES[file]
  found = set()
  for arguments in grid:
    spelt = ",".join(f"{name}={value}" for name, value in arguments.items())
    try:
      cfg = config.load(f"{CONFIGS / file}:{spelt}")
    except ConfigError as error:  # not every network fits 32 cores
      if "on 32 cores" not in str(error):
        raise
      continue
    flat = config.flatten(cfg)
    found |= min((differing(flat, each, cfg.task) for each in protocols), key=len)
  return found


@pytest.mark.parametrize("file", FILES)
def test_a_docstring_names_exactly_the_fields_that_differ_from_the_paper(file):
  assert parts(file)[0] == deviations(file)


@pytest.mark.parametrize("file", FILES)
def test_what_the_paper_does_not_state_is_listed_apart(file):
  task = task_of(file)
  set_here = set(config.flatten(config._read(str(CONFIGS / file))))
  wanted = set_here & set(settings.LEFT_OPEN[task]) | set(settings.NOT_STATED[task])
  assert parts(file)[1] == wanted | OURS.get(file, set())


@pytest.mark.parametrize("file", FILES)
def test_names_in_docstrings_are_fields(file):
  deviating, unstated = parts(file)
  assert deviating | unstated <= set(FIELDS)


def test_every_config_of_the_paper_is_checked():
  named = {path.name for path in CONFIGS.glob("*.py")}
  assert {
    n for n in named if n.removesuffix(".py").endswith(("imagenet", "b512", "places365"))
  } == {*FILES}


@pytest.mark.parametrize("file", FILES)
def test_every_argument_is_varied(file):
  _, grid = FILES[file]
  tree = ast.parse((CONFIGS / file).read_text())
  function = next(each for each in tree.body if getattr(each, "name", "") == "get_config")
  assert {each.arg for each in function.args.args} == {name for each in grid for name in each}
