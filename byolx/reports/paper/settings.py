"""Settings of pretraining, evaluation and supervised training in the paper's tables.

A protocol is a set of required values of config fields. A measured run can be compared with a cell of a
table only if it has all values of the cell's protocol. Each config field is in one of three places: in a
protocol (`MAIN`, `LINEAR`, `SEMI_SUPERVISED`, `SUPERVISED`), in `LEFT_OPEN` if the paper does not state
it, or in `WITHOUT_EFFECT` if no number depends on it.
"""

from collections.abc import Mapping
from typing import Any

from byolx.reports.paper.table import Condition, OneOf

_SPATIAL = {
  "crop_probability": 1.0,
  "crop_area": (0.08, 1.0),
  "crop_aspect": (3 / 4, 4 / 3),
  "flip_probability": 0.5,
}
_VIEW = {
  **_SPATIAL,
  "jitter_probability": 0.8,
  "brightness": 0.4,
  "contrast": 0.4,
  "saturation": 0.2,
  "hue": 0.1,
  "grayscale_probability": 0.2,
  "blur_sigma": (0.1, 2.0),
}

# Appendix C: the size of a view, and the normalisation by ImageNet's statistics.
_INPUT = {
  "views.size": 224,
  "views.mean": (0.485, 0.456, 0.406),
  "views.std": (0.229, 0.224, 0.225),
}

# Appendix A: a ResNet v1; appendix J.1: BatchNorm.
_RESNET = {
  "model.stem": "imagenet",
  "model.stem_channels": 64,
  "model.dilation": 1,
  "model.bn_decay": 0.9,
  "model.bn_eps": 1e-5,
}

# BatchNorm statistics of the whole batch. Table 16 changes train.micro_batch.
_WHOLE_BATCH = {"train.micro_batch": 0, "model.bn_group": 0}

MAIN: Mapping[str, Any] = {
  # All 1,281,167 training images (appendix J.1).
  "data.validation": "none",
  "data.labels": 1.0,
  "data.label_list": "",
  # Table 6. Appendix C changes the brightness by an additive offset.
  **_INPUT,
  "views.brightness_rule": "additive",
  **{f"views.{view}.{name}": value for view in ("view1", "view2") for name, value in _VIEW.items()},
  "views.view1.blur_probability": 1.0,
  "views.view1.solarise_probability": 0.0,
  "views.view2.blur_probability": 0.1,
  "views.view2.solarise_probability": 0.2,
  # Appendix A.
  **_RESNET,
  "byol.projector_hidden": 4096,
  "byol.projector_depth": 2,
  "byol.predictor_hidden": 4096,
  "byol.predictor_depth": 2,
  "byol.projection_size": 256,
  "byol.predictor": True,
  "byol.target": "ema",
  "byol.tau_base": 0.996,
  "byol.tau_rule": "cosine",
  "byol.directions": "sum",
  "optim.name": "lars",
  "optim.base_rate": 0.2,
  "optim.weight_decay": 1.5e-6,
  "optim.momentum": 0.9,
  "optim.trust": 1e-3,
  "optim.warmup_epochs": 10.0,
  "optim.schedule": "cosine",
  "optim.batch_scaling": True,
  "optim.exclude": True,
  "train.epochs": 1000.0,
  "train.batch_size": 4096,
  **_WHOLE_BATCH,
}
"""Pretraining settings of the main results (appendices A and C)."""

ABLATIONS: Mapping[str, Any] = {
  **MAIN,
  # Section 5, as appendix G quotes it.
  "byol.tau_base": 0.99,
  "optim.base_rate": 0.3,
  "optim.weight_decay": 1e-6,
  "train.epochs": 300.0,
}
"""Pretraining settings of the baseline run of appendices G and J, which the ablations change."""

RESNET50: Mapping[str, Any] = {"model.arch": "resnet50", "model.width": 1.0}

ONLINE: Mapping[str, Any] = {"init.encoder": "online"}
"""Setting that the evaluated encoder is that of the online network, not of the target (appendix A)."""

# Settings of the first view: T in Table 6.
_FIRST_VIEW = {
  f"views.view1.{name}": MAIN[f"views.view1.{name}"]
  for name in (*_VIEW, "blur_probability", "solarise_probability")
}

# Settings of all classifiers of appendix D. Where the paper does not state the schedule and the scaling
# of the learning rate, they are those of the authors' code: the paper's rates depend on both.
_CLASSIFICATION = {
  **_INPUT,
  **{f"views.view1.{name}": value for name, value in _SPATIAL.items()},
  **_RESNET,
  "eval.resize": 256,
  "eval.crop_rule": "paper",
  "classify.views": "spatial",
  "classify.tclip": 0.0,
  "classify.logit_penalty": 0.0,
  "classify.label_smoothing": 0.0,
  "optim.name": "sgd",
  "optim.momentum": 0.9,
  "optim.weight_decay": 0.0,
  "optim.warmup_epochs": 0.0,
  "optim.schedule": "cosine",
  "optim.batch_scaling": True,
  "train.batch_size": 1024,
}

LOCAL_VALIDATION: Mapping[str, Any] = {"data.validation": "last_10009"}
"""Setting of ImageNet's validation images: the last 10,009 training images (appendices D.1 and E.1)."""

_LINEAR_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)

LINEAR: Mapping[str, Any] = {
  **_CLASSIFICATION,
  **ONLINE,
  # All rates in one run, or one rate per run of a sweep.
  "optim.rates": OneOf((_LINEAR_RATES, *((rate,) for rate in _LINEAR_RATES))),
  "train.epochs": 80.0,
}
"""Settings of linear evaluation (appendix D.1) on any data set. Validation images choose the rate."""

PRETRAINING_VIEWS: Mapping[str, Any] = {"classify.views": "pretrain", **_FIRST_VIEW}
"""Settings of linear evaluation that trains with the augmentations of the pretraining (appendix D.1).

These are the augmentations T of Table 6, those of the first view.
"""

SEMI_SUPERVISED: Mapping[str, Any] = {
  **_CLASSIFICATION,
  **ONLINE,
  **LOCAL_VALIDATION,
  **_WHOLE_BATCH,
  "optim.rates": (),
  "optim.base_rate": OneOf((0.01, 0.02, 0.05, 0.1, 0.005)),
  "train.epochs": OneOf((30.0, 50.0)),
}
"""Settings of fine-tuning (appendix D.1). Validation images choose the learning rate and the epochs."""

SUPERVISED: Mapping[str, Any] = {
  **{name: value for name, value in _CLASSIFICATION.items() if name != "train.batch_size"},
  **LOCAL_VALIDATION,
  **_WHOLE_BATCH,
  "classify.views": "randaugment",
  "classify.label_smoothing": 0.1,
  "optim.rates": (),
  "optim.weight_decay": 1e-4,
  "optim.warmup_epochs": 5.0,
  "train.epochs": 200.0,
}
"""Settings of the supervised baselines, which are trained from scratch (appendix D.2).

The paper states neither their batch size nor their learning rate.
"""

_OPEN_NETWORK = {
  "model.padding": "same",
  "model.bn_debias": True,
  "model.dtype": "float32",
}
_OPEN_INPUT = {"views.crop_rule": "one_draw", "views.antialias": False}
_OPEN_CLASSIFICATION = {
  **_OPEN_INPUT,
  **_OPEN_NETWORK,
  "eval.antialias": False,
  "classify.head_init": "normal",
}
_OPEN_INITIAL_WEIGHTS = {"model.kernel_init": "uncorrected", "model.bn_last_scale": 1.0}

LEFT_OPEN: Mapping[str, Mapping[str, Any]] = {
  "pretrain": {
    **_OPEN_INPUT,
    **_OPEN_NETWORK,
    **_OPEN_INITIAL_WEIGHTS,
    # In the next three fields the pseudo-code of appendix J differs from the authors' code.
    "byol.output_bias": False,
    "byol.target_init": "own_key",
    "byol.norm_guard": 1e-12,
    "byol.average_statistics": False,
  },
  "linear": _OPEN_CLASSIFICATION,
  "finetune": {**_OPEN_CLASSIFICATION, "optim.exclude": True},
  "supervised": {
    **_OPEN_CLASSIFICATION,
    **_OPEN_INITIAL_WEIGHTS,
    "optim.exclude": True,
    "optim.base_rate": 0.1,
    "train.batch_size": 4096,
    "classify.randaugment.operations": 2,
    "classify.randaugment.magnitude": 9.0,
    "classify.randaugment.bins": 31,
    "classify.randaugment.interpolation": "nearest",
  },
}
"""Fields that the paper does not state, with their values in the shipped configs, by task.

A run with other values of these fields still follows the paper's protocol. `byolx report` lists the
values that differ.
"""

NOT_STATED: Mapping[str, tuple[str, ...]] = {
  "pretrain": (),
  "linear": ("optim.schedule", "optim.warmup_epochs", "optim.batch_scaling"),
  "finetune": ("optim.schedule", "optim.warmup_epochs", "optim.batch_scaling"),
  "supervised": ("optim.batch_scaling", "data.validation"),
}
"""Fields that the paper does not state, but that a run must share with the shipped configs, by task.

Their values are those of the authors' code or our own. A run with other values does not match the
paper's tables, because the paper's learning rates depend on these fields.
"""

_CUSTOM_NETWORK = ("model.blocks", "model.channels", "model.strides", "model.bottleneck")
_ANY_TASK = (
  # Used only with data.validation=share, on Places365: the paper names no validation images there.
  "data.validation_share",
  *("seed", "data.labels_seed", "data.max_failed_share", "data.test_share", "views.placement"),
  *("train.max_gradient_norm", "eval.test", "eval.predictions", "eval.bootstrap"),
  *("eval.fractions", "eval.draws", "eval.batch_size", "eval.max_train"),
  *_CUSTOM_NETWORK,
)

WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
  "pretrain": (
    *("task", "init.", "classify.", "byol.probe_weight", "optim.rates"),
    *("eval.resize", "eval.crop_rule", "eval.antialias"),
    *_ANY_TASK,
  ),
  # The encoder's parameters and statistics are frozen, so the gradient does not depend on micro_batch.
  "linear": (
    *("byol.", "views.view2.", "optim.base_rate", "optim.exclude", "optim.trust"),
    *("train.micro_batch", "model.bn_group", "model.kernel_init", "model.bn_last_scale"),
    *("views.brightness_rule", "classify.randaugment.", "init.workdir"),
    *_ANY_TASK,
  ),
  "finetune": (
    *("byol.", "views.view2.", "optim.trust", "model.kernel_init", "model.bn_last_scale"),
    *("views.brightness_rule", "classify.randaugment.", "init.workdir"),
    *_ANY_TASK,
  ),
  "supervised": (
    *("byol.", "views.view2.", "optim.trust", "views.brightness_rule", "init."),
    *_ANY_TASK,
  ),
}
"""Fields that cannot change any number of the shipped configs, by task.

A name that ends with a dot, such as "byol.", stands for all fields of a group. `data.source`,
`data.labels`, `data.label_list` and, except for pretraining, `task` are not listed here: the record of a
run shows their values, and records are compared as well.
"""


def measured(task: str, metric: str = "top1", data: str = "imagenet") -> Mapping[str, Any]:
  """Returns the values that the paper requires of a record (an entry of results.json).

  The record must be measured on test images, after training with all labels.

  Args:
    task: name of the task, "linear", "finetune" or "supervised".
    metric: name of the metric, "top1" or "top5".
    data: name of the data set.

  Returns:
    Values of the record's keys task, protocol, metric, split, labels and data.
  """
  keys = {"task": task, "protocol": task, "metric": metric, "split": "test", "labels": 1.0}
  return {**keys, "data": data}


def linear(metric: str) -> Condition:
  """Returns the required settings of a run for the paper's linear evaluation on ImageNet (D.1).

  The encoder must be pretrained with the paper's main settings (`MAIN`).

  Args:
    metric: name of the measured metric, "top1" or "top5".
  """
  record = {**measured("linear", metric), "pretrained_on": "imagenet"}
  return Condition(record, {**LINEAR, **LOCAL_VALIDATION}, MAIN)


def finetuned(metric: str) -> Condition:
  """Returns the required settings of a run for the paper's fine-tuning on all labels of ImageNet (D.1).

  The encoder must be a ResNet-50 that was pretrained with the paper's main settings (`MAIN`).

  Args:
    metric: name of the measured metric, "top1" or "top5".
  """
  record = {**measured("finetune", metric), "pretrained_on": "imagenet"}
  return Condition(record, {**SEMI_SUPERVISED, **RESNET50}, MAIN)


def supervised(metric: str) -> Condition:
  """Returns the required settings of a run for the paper's supervised baselines on ImageNet (D.2).

  Args:
    metric: name of the measured metric, "top1" or "top5".
  """
  return Condition(measured("supervised", metric), SUPERVISED)


def ablation(metric: str) -> Condition:
  """Returns the settings that the paper's ablations (appendices G and J) require of a linear evaluation.

  The encoder must be a ResNet-50 that was pretrained on ImageNet with the settings `ABLATIONS`. A row of
  an ablation's table changes some of these settings.

  Args:
    metric: name of the measured metric, "top1" or "top5".
  """
  config = {**LINEAR, **LOCAL_VALIDATION, **RESNET50}
  record = {**measured("linear", metric), "pretrained_on": "imagenet"}
  return Condition(record, config, ABLATIONS, origin_known=True)


def pretrained(fields: Mapping[str, Any]) -> Condition:
  """Returns the required settings of a table row that changes some settings of the pretraining.

  Args:
    fields: the changed config fields of the pretraining run, with their new values.
  """
  return Condition(pretrain=fields)
