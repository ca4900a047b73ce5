"""BYOL on a folder of your own images, on one GPU or a patient CPU.

  byolx train --config=configs/image_folder.py --config.data.folder=photos --workdir=runs/photos
  byolx train --config=configs/image_folder.py:size=224,arch=resnet50,batch=256 --config.data.folder=...
  byolx show-views --config=configs/image_folder.py --config.data.folder=photos

Data: one subfolder of images per class, or images without labels, or `train/` and `test/` of these.
Labels are only measured with, never trained on; without them the run ends with pictures. Unreadable
files are named and left out. Look at the views first: what they hide, the encoder will ignore.

Arguments: `size` of a view in pixels; `arch`, the encoder; `epochs`, of which more are better, most
of all for small folders; `batch`, at most the number of training images. Thousands of images: 256.

Cost: an image takes 8 forward passes' worth of work, each 0.6 billion multiply-adds for ResNet-18 at
128 pixels. One core of a 2-core CPU does about four images a second, so an epoch of a thousand images
takes minutes there; `size=64` costs a quarter. The run prints its own estimate.

Result: depends on the images; not a setting of the paper. Rate, decay and tau are its authors' preset
of 100 epochs, the encoder is that of their small example.

Deviations from the paper: small batches, ResNet-18, small views, a warm-up that shrinks with the
number of epochs. Below 64 pixels the first convolution is 3x3 and nothing is pooled.
"""

from ml_collections import ConfigDict


def get_config(
  size: int = 128, arch: str = "resnet18", epochs: int = 100, batch: int = 64
) -> ConfigDict:
  """Fields that are not named here keep their defaults: views.view1 and view2 are Table 6."""
  config = ConfigDict()
  config.data = {"source": "image_folder", "folder": "", "test_share": 0.2}
  config.views = {"size": size}
  config.model = {"arch": arch, "stem": "imagenet" if size >= 64 else "small"}
  config.byol = {"projector_hidden": 4096, "predictor_hidden": 4096, "tau_base": 0.99}
  config.optim = {
    "name": "lars",
    "base_rate": 0.45,  # per 256 images: the peak is base_rate * batch / 256
    "weight_decay": 1e-6,
    "warmup_epochs": min(10, epochs / 10),
  }
  config.train = {"epochs": epochs, "batch_size": batch}
  config.checkpoint = {"every_epochs": max(1, epochs / 20)}
  config.log = {"every_steps": 10}
  config.eval = {"resize": size * 8 // 7, "max_train": 50_000}
  return config
