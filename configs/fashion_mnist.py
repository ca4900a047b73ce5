"""BYOL on Fashion-MNIST, on the CPU of a laptop.

apt-get install dataset-fashion-mnist
byolx train --config=configs/fashion_mnist.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.data = {"source": "fashion_mnist"}

  # The images are grey, so colours are not changed.
  view = {
    "crop_area": (0.2, 1.0),
    "flip_probability": 0.5,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "solarise_probability": 0.0,
  }
  config.views = {
    "size": 24,
    "antialias": True,
    "mean": (0.286, 0.286, 0.286),
    "std": (0.353, 0.353, 0.353),
    "view1": view,
    "view2": view,
  }

  config.model = {
    "arch": "custom",
    "blocks": (1, 1),
    "channels": (128, 512),
    "strides": (2, 2),
    "bottleneck": True,
    "stem": "medium",
    "stem_channels": 32,
  }
  config.byol = {
    "projector_hidden": 512,
    "predictor_hidden": 512,
    "projection_size": 128,
    "tau_base": 0.99,
  }
  config.optim = {"base_rate": 6.0, "weight_decay": 1e-6, "warmup_epochs": 1.0}
  config.train = {"epochs": 24.0, "batch_size": 64}
  config.checkpoint = {"every_epochs": 1.0}
  config.log = {"every_steps": 100}
  config.eval = {"resize": 24, "antialias": True}
  return config
