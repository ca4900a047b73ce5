"""Supervised baselines on ImageNet (appendix D.2): the same encoders, trained from scratch with labels.

  byolx train --config=configs/supervised_imagenet.py --config.data.folder=/data/imagenet
  byolx train --config=configs/supervised_imagenet.py:arch=resnet200,width=2 ...
  byolx train --config=configs/supervised_imagenet.py:views=spatial ...

RandAugment, label smoothing, weight decay, a cosine after 5 epochs of warm-up, up to 200 epochs.

Cost: 200 epochs of forward and backward passes; not run here.

Result (paper; this config was not run here), top-1 / top-5 (Table 9): ResNet-50 76.4 / 92.9, ResNet-50 4x
80.7 / 95.3, ResNet-200 2x 80.1 / 95.2.

Not stated in the paper: N=2 and M=9 of 31 bins, 14 operations (torchvision's defaults); base rate 0.1 per
256 images; batch 4096. The local validation set is kept apart, as in linear evaluation.
"""

from ml_collections import ConfigDict


def get_config(
  arch: str = "resnet50", width: int = 1, epochs: int = 200, views: str = "randaugment"
) -> ConfigDict:
  """Fields that are not named here keep their defaults."""
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
