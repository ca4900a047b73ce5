"""All config fields, collected from the dataclasses of the config groups.

The default, meaning and check of a field are declared in the module that uses it. This module only
names the groups.
"""

import dataclasses
import functools
import hashlib
import inspect
import sys
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
  return f"one of {names}, or a task that the file of --config or --tasks registers"


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """Config fields that belong to no group."""

  task: str = field(
    "pretrain",
    "training protocol: pretrain, without labels; linear, classifiers on a frozen encoder; finetune, "
    "a classifier and a pretrained encoder; supervised, a classifier and an encoder from scratch",
    _task_name,
  )
  seed: int = field(
    0, "seed of all random numbers: parameters, order of images, views", between(0, 2**32 - 1)
  )


BEFORE_TASKS: dict[str, type] = {
  "": RunSpec,
  "data": DataSpec,
  "views": ViewsSpec,
  "model": ResNetSpec,
}
"""Dataclasses of the config groups that `byolx fields` prints before the groups of the tasks.

The fields of the first dataclass belong to no group, so its name is empty.
"""
AFTER_TASKS: dict[str, type] = {
  "optim": OptimizerSpec,
  "train": TrainSpec,
  "init": InitSpec,
  "mesh": MeshSpec,
  "compile": CompileSpec,
  "checkpoint": Policy,
  "log": LogSpec,
  "eval": EvalSpec,
}
"""Dataclasses of the config groups that `byolx fields` prints after the groups of the tasks."""


def fields() -> dict[str, Field]:
  """Returns all config fields by full name, such as "train.epochs", including those of all tasks.

  The order is that of the command `byolx fields`.
  """
  return dict(_assembled(tuple(TASKS.values())))


def encoder_fields() -> dict[str, Field]:
  """Returns the config fields that change what an encoder with given parameters and statistics computes.

  The initialisers (model.kernel_init, model.bn_last_scale) are not among them. model.bn_group is not
  among them either, because it has an effect in training mode only. model.bn_decay is among them: with
  model.bn_debias, the running averages are divided by 1 - decay^updates whenever they are used.
  """
  selected = {name: field for name, field in fields().items() if field.encoder}
  return dict(sorted(selected.items(), key=lambda item: item[0].partition(".")[0]))


def other_groups(task: str) -> frozenset[str]:
  """Returns the config groups that only other tasks of the user have, not `task`.

  No result of `task` depends on these groups. A group is left out if `task` or a built-in task uses it
  too.
  """
  added = {kind.group for name, kind in TASKS.items() if name not in BUILT_IN and name != task}
  return frozenset(added - {TASKS[task].group} - {TASKS[name].group for name in BUILT_IN})


def task_source(config: ConfigDict) -> str:
  """Returns the SHA-256 hashes of the files that define the user's own task, separated by spaces.

  The files of all classes from which the task inherits are included, except this package's and Python's
  own. So the text is empty for a built-in task.

  Args:
    config: config of the run, with all fields.
  """
  files = set()
  for kind in TASKS[config.task].__mro__:
    if kind.__module__.partition(".")[0] in {"byolx", *sys.stdlib_module_names}:
      continue
    for value in vars(kind).values():
      function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
      if inspect.isfunction(function):
        files.add(Path(function.__code__.co_filename))
  return " ".join(
    hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.is_file()
  )


@functools.lru_cache
def _assembled(tasks: tuple[type, ...]) -> Mapping[str, Field]:
  groups = {name: fields_of(kind) for name, kind in BEFORE_TASKS.items()}
  groups |= {kind.group: kind.fields() for kind in tasks}
  groups |= {name: fields_of(kind) for name, kind in AFTER_TASKS.items()}
  return {
    f"{group}.{name}".lstrip("."): field
    for group, fields in groups.items()
    for name, field in fields.items()
  }
