"""Workdirs as runs and sweeps leave them, written without running anything."""

import json

from byolx.runs import config

LINEAR = {
  "task": "linear",
  "data.validation": "last_10009",
  "classify.views": "spatial",
  "classify.tclip": 0.0,
  "classify.logit_penalty": 0.0,
  "optim.name": "sgd",
  "optim.rates": [0.4, 0.3, 0.2, 0.1, 0.05],
  "optim.weight_decay": 0.0,
  "optim.warmup_epochs": 0.0,
  "train.epochs": 80.0,
  "train.batch_size": 1024,
}
"""Fields of appendix D.1's linear evaluation of a ResNet-50, beside the defaults."""

FINETUNE = LINEAR | {
  "task": "finetune",
  "optim.rates": [],
  "optim.base_rate": 0.05,
  "train.epochs": 30.0,
}
"""Fields of appendix D.1's fine-tuning."""

SUPERVISED = LINEAR | {
  "task": "supervised",
  "classify.views": "randaugment",
  "classify.label_smoothing": 0.1,
  "optim.rates": [],
  "optim.base_rate": 0.1,
  "optim.weight_decay": 1e-4,
  "optim.warmup_epochs": 5.0,
  "train.epochs": 200.0,
  "train.batch_size": 4096,
}
"""Fields of appendix D.2's supervised baselines."""


def fields(changes):
  """A flat config as config.json has it: the defaults, and changes; names may be newer than ours."""
  return {**json.loads(config.to_json(config.defaults())), **changes}


def record(**changes):
  """A record of linear evaluation on ImageNet's test images, as the newer tasks write it."""
  return {
    "task": "linear", "protocol": "linear", "encoder": "online", "labels": 1.0, "split": "test",
    "metric": "top1", "value": 0.7, "interval": None, "n": 1, "seed": 0, "step": 100_000,
    "config": "0123456789ab", "commit": "fedcba987654", "rate": 0.1, "chosen": True,
    "data": "imagenet", "pretrained_on": "imagenet", "pretrain": {}, "devices": "8 x TPU v3",
    **changes,
  }  # fmt: skip


def run(folder, records, changes=LINEAR, rows=()):
  """A workdir; rows of metrics.jsonl are (step, images per second). None for records: no results."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(fields(changes)))
  if records is not None:
    (folder / "results.json").write_text(json.dumps(records))
  lines = [json.dumps({"step": step, "images_per_second": rate}) + "\n" for step, rate in rows]
  if lines:
    (folder / "metrics.jsonl").write_text("".join(lines))
  return folder


def sweep(folder, records):
  """A sweep's workdir, without its runs."""
  folder.mkdir(parents=True)
  (folder / "sweep.json").write_text("{}")
  if records is not None:
    (folder / "results.json").write_text(json.dumps(records))
  return folder
