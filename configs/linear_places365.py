"""Linear evaluation on Places365-Standard (appendix F: the protocol of appendix D.1).

  byolx train --config=configs/linear_places365.py --config.data.folder=/data/places365 \\
    --config.init.workdir=runs/pretrain_places365

The encoder may be pretrained on any data set: Table 13 has encoders of Places365 and of ImageNet, each
measured on both. `configs/linear_imagenet.py` measures on ImageNet, and describes the protocol.

Cost: 80 epochs of forward passes; not run here.

Result (paper; this config was not run here), ResNet-50, top-1 on the official validation images:
pretrained on Places365 53.2, on ImageNet 51.0.

Deviations from the paper: none.

Not stated in the paper, and as in its authors' code on ImageNet: a cosine (`optim.schedule`) without
warm-up (`optim.warmup_epochs`), rates per 256 images (`optim.batch_scaling`).
Ours: the rate is selected on 1 % of the training images (`data.validation`, `data.validation_share`),
since Table 10 has no validation images of Places365. The fields that this file does not set have the
defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(arch: str = "", width: int = 0) -> ConfigDict:
  """Other fields are those of the encoder, or have their defaults.

  The defaults arch="" and width=0 are those of the encoder, or without init.workdir ResNet-50.
  """
  config = ConfigDict()
  config.task = "linear"
  config.data = {
    "source": "places365", "folder": "", "validation": "share", "validation_share": 0.01, "workers": -1
  }  # fmt: skip
  network = {"arch": arch, "width": width}
  config.model = {name: value for name, value in network.items() if value}
  config.classify = {"views": "spatial", "tclip": 0.0, "logit_penalty": 0.0}
  config.optim = {
    "name": "sgd",  # Nesterov
    "rates": (0.4, 0.3, 0.2, 0.1, 0.05),  # per 256 images
    "weight_decay": 0.0,
    "momentum": 0.9,
    "warmup_epochs": 0.0,
  }
  config.train = {"epochs": 80, "batch_size": 1024}
  config.checkpoint = {"every_epochs": 5, "keep": 1}
  config.log = {"every_steps": 100}
  config.eval = {"resize": 256, "batch_size": 1024}
  return config
