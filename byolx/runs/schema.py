"""Every field of a run, assembled from the dataclasses of its groups.

A field's default, meaning and check stand in the module that uses it; here stands only which group has
which name.
"""

import dataclasses
import functools
from collections.abc import Mapping

from byolx.checkpoints.manager import Policy
from byolx.checkpoints.pretrained import InitSpec
from byolx.core.fields import Field, at_least, between, field, fields_of, one_of, whole
from byolx.core.sharding import MeshSpec
from byolx.data.augment.distribution import Views
from byolx.evaluation.settings import EvalSpec
from byolx.models.resnet import ResNetSpec
from byolx.runs.images import DataSpec
from byolx.runs.metrics_log import LogSpec
from byolx.training.compile_cache import CompileSpec
from byolx.training.loop import TrainSpec
from byolx.training.optimizers import OptimizerSpec


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """Fields that are in no group."""

  task: str = field(
    "pretrain",
    "what is trained: pretrain, without labels; linear, classifiers on a frozen encoder; finetune, a "
    "classifier and the encoder it starts from; supervised, both from scratch",
    one_of("pretrain", "linear", "finetune", "supervised"),
  )
  seed: int = field(
    0, "of everything that is drawn: parameters, order, views", between(0, 2**32 - 1)
  )


@dataclasses.dataclass(frozen=True)
class ByolFields:
  """The config group `byol`: appendices A and B."""

  projection_size: int = field(256, "size of projection and prediction", at_least(1))
  projector_hidden: int = field(4096, "hidden size of the projector", at_least(1))
  projector_depth: int = field(2, "linear layers of the projector", at_least(1))
  predictor_hidden: int = field(4096, "hidden size of the predictor", at_least(1))
  predictor_depth: int = field(2, "linear layers of the predictor", at_least(1))
  output_bias: bool = field(False, "a bias in the last layer of both")
  predictor: bool = field(True, "False: the projection is the prediction (Table 19)")
  target: str = field(
    "ema", "what is predicted (Table 19)", one_of("ema", "stop_gradient", "online")
  )
  target_init: str = field(
    "own_key", "target drawn apart from the online network, or a copy", one_of("own_key", "online")
  )
  tau_base: float = field(0.996, "tau at step 0", between(0, 1))
  tau_rule: str = field("cosine", "tau rises to 1, or stays", one_of("cosine", "constant"))
  average_statistics: bool = field(False, "the moving average takes BatchNorm's averages too")
  directions: str = field("sum", "how the two directions' losses join", one_of("sum", "mean"))
  norm_guard: float = field(1e-12, "smallest squared norm in the loss; 0: none", at_least(0))
  probe_weight: float = field(
    1.0, "of the online probe's loss; 0 leaves the probe out", at_least(0)
  )


@dataclasses.dataclass(frozen=True)
class RandAugmentFields:
  """The config group `classify.randaugment`."""

  operations: int = field(2, "N, one after another", whole(1))
  magnitude: float = field(9.0, "M, in bins", at_least(0))
  bins: int = field(31, "of magnitudes, 0 to the largest", whole(2))
  interpolation: str = field("nearest", "of shears and rotations", one_of("nearest", "bilinear"))


@dataclasses.dataclass(frozen=True)
class ClassifyFields:
  """The config group `classify`: appendix D."""

  views: str = field(
    "spatial",
    "of training: crop and flip of views.view1; all of view1 (pretrain, Table 7); or spatial and "
    "RandAugment (appendix D.2)",
    one_of("spatial", "pretrain", "randaugment"),
  )
  tclip: float = field(
    0.0, "alpha of alpha * tanh(logits / alpha) (Table 7: 20); 0: none", at_least(0)
  )
  logit_penalty: float = field(
    0.0,
    "beta, times the mean squared (clipped) logit, added to the loss (Table 7: 0.01)",
    at_least(0),
  )
  label_smoothing: float = field(
    0.0, "share of a label that is spread over all classes", between(0, 0.999)
  )
  head_init: str = field(
    "normal", "kernel of the classifier: as the encoder's, or zeros", one_of("normal", "zeros")
  )
  randaugment: RandAugmentFields = RandAugmentFields()


GROUPS: dict[str, type] = {
  "": RunSpec,
  "data": DataSpec,
  "views": Views,
  "model": ResNetSpec,
  "byol": ByolFields,
  "classify": ClassifyFields,
  "optim": OptimizerSpec,
  "train": TrainSpec,
  "init": InitSpec,
  "mesh": MeshSpec,
  "compile": CompileSpec,
  "checkpoint": Policy,
  "log": LogSpec,
  "eval": EvalSpec,
}
"""The dataclass of each group; fields of the first have no group in their names."""


def fields() -> dict[str, Field]:
  """Every field by its dotted name, in the order of `byolx fields`."""
  return dict(_assembled(tuple(GROUPS.items())))


def encoder_fields() -> dict[str, Field]:
  """The fields that go with an encoder: the function that was trained is its arrays and these.

  Initialisers (model.kernel_init, model.bn_last_scale) and model.bn_group, which is used in training mode
  only, are not among them. model.bn_decay is: with model.bn_debias the running averages are divided by
  1 - decay^updates whenever they are used.
  """
  found = {name: field for name, field in fields().items() if field.encoder}
  return dict(sorted(found.items(), key=lambda item: item[0].partition(".")[0]))


@functools.lru_cache
def _assembled(groups: tuple[tuple[str, type], ...]) -> Mapping[str, Field]:
  found = {}
  for group, kind in groups:
    prefix = f"{group}." if group else ""
    found |= {prefix + name: declared for name, declared in fields_of(kind).items()}
  return found
