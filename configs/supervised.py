"""A supervised baseline from scratch: the encoder and the images of a pretraining run, and its labels.

  byolx train --config=configs/supervised.py:labels=0.1 --config.init.like=runs/photos \\
    --workdir=runs/photos_supervised
  byolx train --config=configs/supervised.py:views=randaugment ...

Appendix D.2 for small sets: weight decay, label smoothing, a cosine after a warm-up of a twentieth of the
epochs, RandAugment with `views=randaugment`. Images, view size and encoder are those of the run in
`init.like`, unless fields say otherwise; nothing that it learned is used.

Arguments: `labels`, a balanced share; `views`; `rate`, per 256 images; `epochs`; `batch`.

Cost: minutes for Fashion-MNIST on two CPU cores (docs/imagenet_protocols.md).
"""

from ml_collections import ConfigDict


def get_config(
  labels: float = 1.0, views: str = "spatial", rate: float = 0.1, epochs: int = 30, batch: int = 64
) -> ConfigDict:
  """Fields that are not named here are those of `init.like`, or keep their defaults."""
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
