"""The settings that the tables share: how encoders are pretrained, how they are measured."""

from collections.abc import Mapping
from typing import Any

from byolx.reports.paper.table import Condition

_VIEW = {
  "crop_probability": 1.0,
  "crop_area": (0.08, 1.0),
  "crop_aspect": (3 / 4, 4 / 3),
  "flip_probability": 0.5,
  "jitter_probability": 0.8,
  "brightness": 0.4,
  "contrast": 0.4,
  "saturation": 0.2,
  "hue": 0.1,
  "grayscale_probability": 0.2,
  "blur_sigma": (0.1, 2.0),
}

MAIN: Mapping[str, Any] = {
  # Table 6.
  "views.size": 224,
  **{f"views.{view}.{name}": value for view in ("view1", "view2") for name, value in _VIEW.items()},
  "views.view1.blur_probability": 1.0,
  "views.view1.solarise_probability": 0.0,
  "views.view2.blur_probability": 0.1,
  "views.view2.solarise_probability": 0.2,
  # Appendix A.
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
  "optim.exclude": True,
  "train.epochs": 1000.0,
  "train.batch_size": 4096,
}
"""Pretraining of the main results: appendices A and C."""

ABLATIONS: Mapping[str, Any] = {
  **MAIN,
  # Section 5, as appendix G quotes it.
  "byol.tau_base": 0.99,
  "optim.base_rate": 0.3,
  "optim.weight_decay": 1e-6,
  "train.epochs": 300.0,
  # Table 16: statistics over the whole batch.
  "train.micro_batch": 0,
  "model.bn_group": 0,
}
"""Pretraining of the baseline of appendices G and J."""

RESNET50: Mapping[str, Any] = {"model.arch": "resnet50", "model.width": 1.0}

PLAIN: Mapping[str, Any] = {
  "classify.views": "spatial",
  "classify.tclip": 0.0,
  "classify.logit_penalty": 0.0,
}
"""Appendix D.1: spatial augmentations, no regularisation of logits."""

ONLINE: Mapping[str, Any] = {"init.encoder": "online"}
"""What is evaluated (appendix A): the online network's encoder."""


def measured(task: str, metric: str = "top1", data: str = "imagenet") -> Mapping[str, Any]:
  """The record of a task on the test images, of the head that the validation images chose.

  Args:
    task: "linear", "finetune" or "supervised".
    metric: "top1" or "top5".
    data: name of the data set.
  """
  keys = {"task": task, "protocol": task, "metric": metric, "split": "test", "labels": 1.0}
  return {**keys, "data": data}


def linear(metric: str) -> Condition:
  """Linear evaluation on ImageNet of an encoder pretrained there by the main settings (D.1)."""
  record = {**measured("linear", metric), "pretrained_on": "imagenet"}
  return Condition(record, {**ONLINE, **PLAIN}, MAIN)


def ablation(metric: str) -> Condition:
  """Linear evaluation of a ResNet-50 pretrained by the settings of appendices G and J."""
  record = {**measured("linear", metric), "pretrained_on": "imagenet"}
  return Condition(record, {**ONLINE, **PLAIN, **RESNET50}, ABLATIONS, origin_known=True)


def pretrained(fields: Mapping[str, Any]) -> Condition:
  """A run whose encoder's pretraining differs from the column's in these fields."""
  return Condition(pretrain=fields)
