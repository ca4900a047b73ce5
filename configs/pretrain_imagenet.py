"""BYOL on ImageNet: the paper's main run (appendix A, Table 6), and its shorter schedules.

  byolx train --config=configs/pretrain_imagenet.py --config.data.folder=/data/imagenet
  byolx train --config=configs/pretrain_imagenet.py:arch=resnet200,width=2,cores=512 --distributed ...
  byolx plan --config=configs/pretrain_imagenet.py:arch=resnet200,width=2,cores=512 --topology=v3:16x16
  byolx train --config=configs/pretrain_imagenet.py:epochs=100,batch=1024 --config.data.folder=...

Data: a folder with `train/WNID/*.JPEG` (1,281,167 images) and `val/WNID/*.JPEG` (50,000). The paper
selected its hyperparameters on training images held out by `--config.data.validation=last_10009`.

Cost (paper): ResNet-50, 1000 epochs: 8 hours on 512 TPU v3 cores, 44,000 images a second.

Arguments: `arch` and `width` of the encoder; `epochs`, one of the schedules below; `batch`, images per
step; `cores`, number of cores of a TPU v3 slice: 512, 128 or 32, or 0 for other devices.

With `cores`, computation is in bfloat16, with float32 parameters, statistics and gradients; the state is
sharded over up to 64 cores; and 32 cores also have the rematerialisation and the micro-batch that a batch
of 4096 needs to fit into memory (docs/plan.md). Networks other than ResNet-50 1x have bfloat16 and a
sharded state also with cores=0. ResNet-50 1x with cores=0 computes in float32, with the state whole on
every device. If 4096 images do not fit, `--config.train.micro_batch=512` averages the gradients of
several passes; BatchNorm's statistics are then those of 512 images (Table 16).

Result (paper; this config was not run here), ResNet-50, top-1 of the linear protocol on `val`:

  epochs=1000   74.3   Table 9; ResNet-200 2x: 79.6
  epochs=300    72.5   section 5 and appendix G, the setting of all ablations
  epochs=100    -      preset of the authors' code
  epochs=40     61.5   preset of the authors' code; its online probe: 62 +- 0.5

Deviations from the paper, by field:

  `model.dtype`: bfloat16 for every network but ResNet-50 1x, and for ResNet-50 1x with `cores`. The
    authors' code computes in float32.
  `train.micro_batch`: 1024 with `cores=32` for ResNet-50 4x and ResNet-200 2x. Gradients are averaged
    over four passes, so BatchNorm's statistics are those of 1024 images, not of 4096 (Table 16).
  `train.batch_size`: the argument `batch`. The paper has hyperparameters for 4096 and for 512
    (configs/pretrain_imagenet_b512.py); for other sizes, only the peak rate is scaled.
  `train.epochs`, `optim.base_rate`, `byol.tau_base`: with `epochs=100` and `epochs=40`, presets of the
    authors' code, for which the paper has no result; the other fields are those of 300 epochs.
  `eval.max_train`: at the end of a run, the encoder is measured by L-BFGS on the features of at most
    50,000 training images; the classifier of appendix D.1 is `configs/linear_imagenet.py`.

Not stated in the paper: `model.dtype`, which is float32 as in the authors' code, unless stated otherwise
above. The fields that this file does not set have the defaults of docs/fidelity.md.
"""

from ml_collections import ConfigDict

# epochs: (base rate, weight decay, tau_base)
PRESETS = {
  40: (0.45, 1e-6, 0.97),
  100: (0.45, 1e-6, 0.99),
  300: (0.3, 1e-6, 0.99),
  1000: (0.2, 1.5e-6, 0.996),
}


# (arch, width): (remat, micro_batch) with which a batch of 4096 fits on 32 cores (docs/plan.md).
ON_32_CORES = {
  ("resnet50", 1): ("none", 0),
  ("resnet50", 4): ("block", 1024),
  ("resnet200", 2): ("block", 1024),
}


def get_config(
  arch: str = "resnet50", width: int = 1, epochs: int = 1000, batch: int = 4096, cores: int = 0
) -> ConfigDict:
  """Other fields have their defaults; views.view1 and views.view2 are T and T' of Table 6."""
  if epochs not in PRESETS:
    choices = ", ".join(map(str, PRESETS))
    raise ValueError(f"epochs={epochs}: expected one of {choices}; or set --config.train.epochs")
  base_rate, weight_decay, tau_base = PRESETS[epochs]
  if cores not in (0, 32, 128, 512):
    raise ValueError(f"cores={cores}: expected 512, 128 or 32 TPU v3 cores, or 0")

  config = ConfigDict()
  config.data = {"source": "imagenet", "folder": "", "validation": "none", "workers": -1}
  config.views = {"size": 224}
  config.model = {"arch": arch, "width": width, "stem": "imagenet", "dtype": "float32"}
  config.byol = {
    "projector_hidden": 4096,
    "predictor_hidden": 4096,
    "projection_size": 256,
    "tau_base": tau_base,
  }
  config.optim = {
    "name": "lars",
    "base_rate": base_rate,  # per 256 images: the peak is base_rate * batch / 256
    "weight_decay": weight_decay,
    "momentum": 0.9,
    "trust": 1e-3,
    "warmup_epochs": 10,
  }
  config.train = {"epochs": epochs, "batch_size": batch}
  if cores or (arch, width) != ("resnet50", 1):
    config.model.dtype = "bfloat16"
    config.mesh = {"state": "full"}
  if cores == 32:
    if (arch, width) not in ON_32_CORES:
      fits = ", ".join(f"arch={arch},width={width}" for arch, width in ON_32_CORES)
      raise ValueError(f"arch={arch},width={width} on 32 cores: expected one of {fits}")
    config.train.remat, config.train.micro_batch = ON_32_CORES[arch, width]
  config.checkpoint = {"every_epochs": 5, "keep": 2}
  config.log = {"every_steps": 50}
  config.eval = {"resize": 256, "batch_size": 1024, "max_train": 50_000}
  return config
