"""BYOL on Places365-Standard, with the hyperparameters of ImageNet (appendix F, Table 13).

  byolx train --config=configs/pretrain_places365.py --config.data.folder=/data/places365

Data: a folder with `places365_train_standard.txt` (1,803,460 images, 365 classes), `places365_val.txt`
(36,500), and the images in `data_256/` and `val_256/`, or `data_large/` and `val_large/`.

Cost (paper): not stated. The run has 1.4 times the steps of the run on ImageNet, which took 8 hours on
512 TPU v3 cores.

Result (paper; this config was not run here), ResNet-50, 1000 epochs, linear evaluation: 53.2 top-1
on Places365, 58.5 on ImageNet, 64.2 on SUN397.

Deviations from the paper, by field:

  `eval.max_train`: at the end of a run, the encoder is measured by L-BFGS on the features of at most
    50,000 training images; the classifier of appendix D.1 is `configs/linear_places365.py`.

Not stated in the paper: `model.dtype`, which is float32 as in the authors' code, for every network.
The fields that this file does not set have the defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(arch: str = "resnet50", width: int = 1) -> ConfigDict:
  """Other fields have their defaults; views.view1 and views.view2 are T and T' of Table 6."""
  config = ConfigDict()
  config.data = {"source": "places365", "folder": "", "validation": "none", "workers": -1}
  config.views = {"size": 224}
  config.model = {"arch": arch, "width": width, "stem": "imagenet", "dtype": "float32"}
  config.byol = {
    "projector_hidden": 4096,
    "predictor_hidden": 4096,
    "projection_size": 256,
    "tau_base": 0.996,
  }
  config.optim = {
    "name": "lars",
    "base_rate": 0.2,  # per 256 images: the peak is 0.2 * 4096 / 256
    "weight_decay": 1.5e-6,
    "momentum": 0.9,
    "trust": 1e-3,
    "warmup_epochs": 10,
  }
  config.train = {"epochs": 1000, "batch_size": 4096}
  config.checkpoint = {"every_epochs": 5, "keep": 2}
  config.log = {"every_steps": 50}
  config.eval = {"resize": 256, "batch_size": 1024, "max_train": 50_000}
  return config
