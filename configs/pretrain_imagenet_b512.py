"""BYOL on ImageNet with batches of 512 (appendix H).

  byolx train --config=configs/pretrain_imagenet_b512.py --config.data.folder=/data/imagenet

Data: a folder with `train/WNID/*.JPEG` (1,281,167 images) and `val/WNID/*.JPEG` (50,000). The paper
selected its hyperparameters on training images held out by `--config.data.validation=last_10009`.

Cost (paper): ResNet-50, 1000 epochs: about 4 days on 64 TPU v3 cores.

Result (paper; this config was not run here): 73.7 top-1 of the linear protocol on `val`, against
74.3 with batches of 4096.

Deviations from the paper, by field:

  `eval.max_train`: at the end of a run, the encoder is measured by L-BFGS on the features of at most
    50,000 training images; the classifier of appendix D.1 is `configs/linear_imagenet.py`.

Not stated in the paper: `model.dtype`, which is float32 as in the authors' code, for every network.
The fields that this file does not set have the defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(arch: str = "resnet50", width: int = 1) -> ConfigDict:
  """Other fields have their defaults; views.view1 and views.view2 are T and T' of Table 6."""
  config = ConfigDict()
  config.data = {"source": "imagenet", "folder": "", "validation": "none", "workers": -1}
  config.views = {"size": 224}
  config.model = {"arch": arch, "width": width, "stem": "imagenet", "dtype": "float32"}
  config.byol = {
    "projector_hidden": 4096,
    "predictor_hidden": 4096,
    "projection_size": 256,
    "tau_base": 0.9995,  # 0.996 with batches of 4096
  }
  config.optim = {
    "name": "lars",
    "base_rate": 0.4,  # 0.2 with batches of 4096; the peak is base_rate * 512 / 256
    "weight_decay": 1.5e-6,
    "momentum": 0.9,
    "trust": 1e-3,
    "warmup_epochs": 10,
  }
  config.train = {"epochs": 1000, "batch_size": 512}
  config.checkpoint = {"every_epochs": 1, "keep": 2}
  config.log = {"every_steps": 250}
  config.eval = {"resize": 256, "batch_size": 1024, "max_train": 50_000}
  return config
