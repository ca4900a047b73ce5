"""Semi-supervised learning on ImageNet: fine-tuning on a share of the labels (appendix D.1).

  byolx train --config=configs/semi_supervised_imagenet.py:labels=0.1 \\
    --config.data.folder=/data/imagenet --config.init.workdir=runs/pretrain_imagenet
  byolx sweep --config=configs/semi_supervised_imagenet.py --grid=semi_supervised ...
  byolx sweep --config=configs/semi_supervised_imagenet.py --grid=figure4 ...

A classifier and the encoder of `init.workdir` are trained, with the network and view size of the encoder
(`arch` and `width` as in configs/linear_imagenet.py). The paper selects the rate from
{0.01, 0.02, 0.05, 0.1, 0.005} and the epochs from {30, 50} on its local validation set. This is the grid
`semi_supervised`; the grid `figure4` repeats it for each share of Figure 4.

`labels` is a class-balanced random share; a smaller share is part of a larger one. Table 2 uses SimCLR's
lists of 1 % and 10 %: `--config.data.label_list=1percent.txt`.

Cost: not run here. Result (paper; this config was not run here), ResNet-50, all labels: 77.7 top-1, 93.9
top-5 (Table 8).

Deviations from the paper, by field, with arguments outside its grid only:

  `optim.base_rate`: the argument `rate`.
  `train.epochs`: the argument `epochs`.

Not stated in the paper, and ours as in linear evaluation: a cosine (`optim.schedule`) without warm-up
(`optim.warmup_epochs`), rates per 256 images (`optim.batch_scaling`). The fields
that this file does not set have the defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(
  arch: str = "", width: int = 0, labels: float = 1.0, rate: float = 0.05, epochs: int = 30
) -> ConfigDict:
  """Other fields are those of the encoder, or have their defaults.

  The defaults arch="" and width=0 are those of the encoder, or without init.workdir ResNet-50.
  """
  config = ConfigDict()
  config.task = "finetune"
  config.data = {
    "source": "imagenet", "folder": "", "validation": "last_10009", "labels": labels, "workers": -1
  }  # fmt: skip
  network = {"arch": arch, "width": width}
  config.model = {name: value for name, value in network.items() if value}
  config.classify = {"views": "spatial", "tclip": 0.0, "logit_penalty": 0.0, "label_smoothing": 0.0}
  config.optim = {
    "name": "sgd",  # Nesterov
    "base_rate": rate,  # per 256 images
    "weight_decay": 0.0,
    "momentum": 0.9,
    "warmup_epochs": 0.0,
  }
  config.train = {"epochs": epochs, "batch_size": 1024}
  config.checkpoint = {"every_epochs": 5, "keep": 1}
  config.log = {"every_steps": 50}
  config.eval = {"resize": 256, "batch_size": 1024}
  return config
