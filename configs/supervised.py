"""Supervised baseline from scratch, with the encoder and the labelled images of a pretraining run.

  byolx train --config=configs/supervised.py:labels=0.1 --config.init.like=runs/photos \\
    --workdir=runs/photos_supervised
  byolx train --config=configs/supervised.py:views=randaugment ...

The protocol of appendix D.2 for small data sets: weight decay, label smoothing, a cosine after a warm-up
of a twentieth of the epochs, and RandAugment with `views=randaugment`. Images, view size and architecture
are those of the run in `init.like`, except for fields that are set; its weights are not used.

Arguments: `labels`, class-balanced share of the labels; `views`, training views (`classify.views`);
`rate`, base learning rate per 256 images; `epochs`; `batch`, images per step.

Cost: minutes for Fashion-MNIST on two CPU cores (docs/imagenet_protocols.md).
"""

from ml_collections import ConfigDict


def get_config(
  labels: float = 1.0, views: str = "spatial", rate: float = 0.1, epochs: int = 30, batch: int = 64
) -> ConfigDict:
  """Other fields are those of `init.like`, or have their defaults."""
  config = ConfigDict()
  config.task = "supervised"
  config.init = {"inherit": ("data", "views", "model", "eval")}
  config.data = {"validation": "share", "validation_share": 0.1, "labels": labels}
  config.classify = {
    "views": views,
    "label_smoothing": 0.1,
    "randaugment": {"operations": 2, "magnitude": 9.0, "bins": 31},
  }
  config.optim = {
    "name": "sgd",  # Nesterov
    "base_rate": rate,
    "weight_decay": 1e-4,
    "warmup_epochs": epochs / 20,
  }
  config.train = {"epochs": epochs, "batch_size": batch}
  config.checkpoint = {"every_epochs": max(1.0, epochs / 5), "keep": 1}
  return config
