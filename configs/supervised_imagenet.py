"""Supervised baselines on ImageNet (appendix D.2): the same encoders from scratch, with labels.

  byolx train --config=configs/supervised_imagenet.py --config.data.folder=/data/imagenet
  byolx train --config=configs/supervised_imagenet.py:arch=resnet200,width=2 ...
  byolx train --config=configs/supervised_imagenet.py:views=spatial ...

They have RandAugment, label smoothing, weight decay, and a cosine after 5 epochs of warm-up.

Cost: 200 epochs of forward and backward passes; not run here.

Result (paper; this config was not run here), top-1 / top-5 (Table 9): ResNet-50 76.4 / 92.9, ResNet-50 4x
80.7 / 95.3, ResNet-200 2x 80.1 / 95.2.

Deviations from the paper, by field, with other arguments only:

  `train.epochs`: the argument `epochs`. The paper trains for up to 200.
  `classify.views`: crops and flips without RandAugment, with `views=spatial`.

Not stated in the paper, and ours: RandAugment's N = 2 (`classify.randaugment.operations`) and M = 9
(`classify.randaugment.magnitude`) of 31 bins (`classify.randaugment.bins`), with torchvision's 14
operations; a base rate of 0.1 (`optim.base_rate`) per 256 images (`optim.batch_scaling`); a batch of 4096
(`train.batch_size`); float32 (`model.dtype`). Training leaves out the local validation set
(`data.validation`), as Table 10 counts. The fields that this file does not set have the defaults of
docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(
  arch: str = "resnet50", width: int = 1, epochs: int = 200, views: str = "randaugment"
) -> ConfigDict:
  """Other fields have their defaults."""
  config = ConfigDict()
  config.task = "supervised"
  config.data = {"source": "imagenet", "folder": "", "validation": "last_10009", "workers": -1}
  config.views = {"size": 224}
  config.model = {"arch": arch, "width": width, "stem": "imagenet", "dtype": "float32"}
  config.classify = {
    "views": views,
    "label_smoothing": 0.1,
    "randaugment": {"operations": 2, "magnitude": 9.0, "bins": 31},
  }
  config.optim = {
    "name": "sgd",  # Nesterov
    "base_rate": 0.1,  # per 256 images
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "warmup_epochs": 5.0,
  }
  config.train = {"epochs": epochs, "batch_size": 4096}
  config.checkpoint = {"every_epochs": 5, "keep": 2}
  config.log = {"every_steps": 50}
  config.eval = {"resize": 256, "batch_size": 1024}
  return config
