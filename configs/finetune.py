"""Fine-tuning an encoder on a share of the labels of the images that it was pretrained on.

  byolx train --config=configs/finetune.py:labels=0.1 --config.init.workdir=runs/photos \\
    --workdir=runs/photos_10percent
  byolx sweep --config=configs/finetune.py --grid=figure4 --seeds=0,1,2 \\
    --config.init.workdir=runs/photos --workdir=runs/photos_figure4

Appendix D.1's semi-supervised protocol for small sets: images, views and network are those of the run in
`init.workdir`. Fields may differ from it, but for those that go with the encoder. Choose `rate` and
`epochs` on the validation images, a tenth of the training images that is kept apart: `byolx sweep` does.

Arguments: `labels`, a balanced share; `rate`, per 256 images; `epochs`; `batch`.

Cost: minutes for Fashion-MNIST on two CPU cores (docs/imagenet_protocols.md).
"""

from ml_collections import ConfigDict


def get_config(
  labels: float = 1.0, rate: float = 0.1, epochs: int = 30, batch: int = 64
) -> ConfigDict:
  """Fields that are not named here are those of `init.workdir`, or keep their defaults."""
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
