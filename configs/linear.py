"""Linear evaluation of an encoder on its pretraining images, of any data set.

  byolx train --config=configs/linear.py --config.init.workdir=runs/photos --workdir=runs/photos_linear
  byolx train --config=configs/linear.py:views=pretrain,tclip=20,penalty=0.01 ...
  byolx sweep --config=configs/linear.py --grid=table7 --seeds=0,1,2 ...

The protocol of appendix D.1 for small data sets. Images, views and network are those of the run in
`init.workdir`; other values may be set, except for the fields of the encoder (network, compute type,
view size, colour normalisation). Five classifiers, one for each of the paper's rates, are trained at once
on the frozen encoder. The best one on a tenth of the training images, held out for validation, is
measured on the test images.

Arguments: `views`, `tclip`, `penalty` as in configs/linear_imagenet.py; `epochs`; `batch`, images per
step.

Cost: forward passes only; minutes for Fashion-MNIST on two CPU cores (docs/imagenet_protocols.md).
"""

from ml_collections import ConfigDict


def get_config(
  views: str = "spatial",
  tclip: float = 0.0,
  penalty: float = 0.0,
  epochs: int = 20,
  batch: int = 256,
) -> ConfigDict:
  """Other fields are those of `init.workdir`, or have their defaults."""
  config = ConfigDict()
  config.task = "linear"
  config.init = {"inherit": ("data", "views", "model", "eval")}
  config.data = {"validation": "share", "validation_share": 0.1}
  config.classify = {"views": views, "tclip": tclip, "logit_penalty": penalty}
  config.optim = {
    "name": "sgd",  # Nesterov
    "rates": (0.4, 0.3, 0.2, 0.1, 0.05),  # per 256 images
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
  }
  config.train = {"epochs": epochs, "batch_size": batch}
  config.checkpoint = {"every_epochs": max(1.0, epochs / 10), "keep": 1}
  return config
