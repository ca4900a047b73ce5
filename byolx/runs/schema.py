"""Every field of a run, assembled from the dataclasses of its groups.

A field's default, meaning and check stand in the module that uses it; here stands only which group has
which name.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from byolx.checkpoints.manager import Policy
from byolx.checkpoints.pretrained import InitSpec
from byolx.core.fields import Field, between, field, fields_of
from byolx.core.sharding import MeshSpec
from byolx.data.augment.distribution import ViewsSpec
from byolx.evaluation.settings import EvalSpec
from byolx.models.resnet import ResNetSpec
from byolx.runs.images import DataSpec
from byolx.runs.metrics_log import LogSpec
from byolx.tasks import BUILT_IN, TASKS
from byolx.training.compile_cache import CompileSpec
from byolx.training.loop import TrainSpec
from byolx.training.optimizers import OptimizerSpec


def _task_name(value: str) -> str | None:
  if value in TASKS:
    return None
  names = ", ".join(TASKS)
  return f"one of {names}; a protocol of your own is registered by the file in --config or --tasks"


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """Fields that are in no group."""

  task: str = field(
    "pretrain",
    "training protocol: pretrain, without labels; linear, classifiers on a frozen encoder; finetune, a "
    "classifier and the encoder it starts from; supervised, both from scratch",
    _task_name,
  )
  seed: int = field(
    0, "seed of all random numbers: parameters, order, views", between(0, 2**32 - 1)
  )


_BEFORE_TASKS: dict[str, type] = {
  "": RunSpec,
  "data": DataSpec,
  "views": ViewsSpec,
  "model": ResNetSpec,
}
_AFTER_TASKS: dict[str, type] = {
  "optim": OptimizerSpec,
  "train": TrainSpec,
  "init": InitSpec,
  "mesh": MeshSpec,
  "compile": CompileSpec,
  "checkpoint": Policy,
  "log": LogSpec,
  "eval": EvalSpec,
}


def fields() -> dict[str, Field]:
  """Every field by its dotted name, those of all tasks included, in the order of `byolx fields`."""
  return dict(_assembled(tuple(TASKS.values())))


def encoder_fields() -> dict[str, Field]:
  """The fields that go with an encoder: the function that was trained is its arrays and these.

  Initialisers (model.kernel_init, model.bn_last_scale) and model.bn_group, which is used in training mode
  only, are not among them. model.bn_decay is: with model.bn_debias the running averages are divided by
  1 - decay^updates whenever they are used.
  """
  of_encoder = {name: field for name, field in fields().items() if field.encoder}
  return dict(sorted(of_encoder.items(), key=lambda item: item[0].partition(".")[0]))


def other_groups(task: str) -> frozenset[str]:
  """Groups of the user's own tasks but this one: no result of the task depends on them."""
  added = {kind.group for name, kind in TASKS.items() if name not in BUILT_IN and name != task}
  return frozenset(added - {TASKS[task].group} - {TASKS[name].group for name in BUILT_IN})


def task_source(config: ConfigDict) -> str:
  """The digest of the file that defines the user's own task; empty for the tasks of this package."""
  path = Path(TASKS[config.task].loss.__code__.co_filename)
  if Path(__file__).parents[1] in path.parents or not path.is_file():
    return ""
  return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache
def _assembled(tasks: tuple[type, ...]) -> Mapping[str, Field]:
  groups = {name: fields_of(kind) for name, kind in _BEFORE_TASKS.items()}
  groups |= {kind.group: kind.fields() for kind in tasks}
  groups |= {name: fields_of(kind) for name, kind in _AFTER_TASKS.items()}
  return {
    f"{group}.{name}".lstrip("."): field
    for group, fields in groups.items()
    for name, field in fields.items()
  }
