"""Fine-tuning of an encoder on a share of the labels of its pretraining images.

  byolx train --config=configs/finetune.py:labels=0.1 --config.init.workdir=runs/photos \\
    --workdir=runs/photos_10percent
  byolx sweep --config=configs/finetune.py --grid=figure4 --seeds=0,1,2 \\
    --config.init.workdir=runs/photos --workdir=runs/photos_figure4

The semi-supervised protocol of appendix D.1 for small data sets. Images, views and network are those of
the run in `init.workdir`; other values may be set, except for the fields of the encoder. A tenth of the
training images is held out for validation, on which `byolx sweep` selects `rate` and `epochs`.

Arguments: `labels`, class-balanced share of the labels; `rate`, base learning rate per 256 images;
`epochs`; `batch`, images per step.

Cost: minutes for Fashion-MNIST on two CPU cores (docs/imagenet_protocols.md).
"""

from ml_collections import ConfigDict


def get_config(
  labels: float = 1.0, rate: float = 0.1, epochs: int = 30, batch: int = 64
) -> ConfigDict:
  """Other fields are those of `init.workdir`, or have their defaults."""
  config = ConfigDict()
  config.task = "finetune"
  config.init = {"inherit": ("data", "views", "model", "eval")}
  config.data = {"validation": "share", "validation_share": 0.1, "labels": labels}
  config.classify = {"views": "spatial"}
  config.optim = {
    "name": "sgd",  # Nesterov
    "base_rate": rate,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
  }
  config.train = {"epochs": epochs, "batch_size": batch}
  config.checkpoint = {"every_epochs": max(1.0, epochs / 5), "keep": 1}
  return config
