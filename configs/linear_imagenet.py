"""Linear evaluation on ImageNet (appendix D.1), and its variation (Table 7).

  byolx train --config=configs/linear_imagenet.py --config.data.folder=/data/imagenet \\
    --config.init.workdir=runs/pretrain_imagenet
  byolx train --config=configs/linear_imagenet.py:views=pretrain,tclip=20,penalty=0.01 ...
  byolx sweep --config=configs/linear_imagenet.py --grid=table7 ...

A linear classifier is trained on the frozen encoder of `init.workdir`. The encoder's parameters and
statistics do not change, which is checked bit for bit at the end. Five classifiers, one for each of the
paper's rates, are trained at once, with one forward pass of the encoder per batch. The best one on the
local validation set (the last 10009 training images in TensorFlow's order) is measured on `val`.

Network, padding, compute type, view size and colour normalisation are those of the encoder, and need not
be set. `arch` and `width` are for `byolx plan`, which reads no encoder; in a run they must equal the
encoder's. `views=pretrain` trains on views from T of Table 6; `tclip` is alpha of
alpha * tanh(logits / alpha); `penalty` is the weight beta of the squared logits. If the encoder's views
do not have 224 pixels, set `--config.eval.resize` to 8/7 of their side.

Cost: 80 epochs of forward passes; not run here.

Result (paper; this config was not run here), top-1 / top-5 after 1000 epochs of pretraining:

                         ResNet-50     ResNet-50 4x  ResNet-200 2x
  without variation      74.3 / 91.6   78.6 / 94.2   79.6 / 94.8 (Table 9: 94.9)
  views                  74.4 / 91.8   78.6 / 94.3   79.6 / 94.8
  tclip, penalty         74.7 / 91.8   78.9 / 94.3   79.8 / 95.0
  all                    74.8 / 91.8   79.0 / 94.5   80.0 / 95.0

Deviations from the paper: none. `views`, `tclip` and `penalty` are the rows of Table 7.

Not stated in the paper, and as in its authors' code: a cosine (`optim.schedule`) without warm-up
(`optim.warmup_epochs`), rates per 256 images (`optim.batch_scaling`). Ours: with
`views=pretrain`, the classifier is trained on T alone, not on T and T' (`classify.views`). The fields
that this file does not set have the defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict


def get_config(
  arch: str = "",
  width: int = 0,
  views: str = "spatial",
  tclip: float = 0.0,
  penalty: float = 0.0,
) -> ConfigDict:
  """Other fields are those of the encoder, or have their defaults; views.view1 is T of Table 6.

  The defaults arch="" and width=0 are those of the encoder, or without init.workdir ResNet-50.
  """
  config = ConfigDict()
  config.task = "linear"
  config.data = {"source": "imagenet", "folder": "", "validation": "last_10009", "workers": -1}
  network = {"arch": arch, "width": width}
  config.model = {name: value for name, value in network.items() if value}
  config.classify = {"views": views, "tclip": tclip, "logit_penalty": penalty}
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
