"""BYOL on a folder of your own images, on one GPU or a CPU.

  byolx train --config=configs/image_folder.py --config.data.folder=photos --workdir=runs/photos
  byolx train --config=configs/image_folder.py:size=224,arch=resnet50,batch=256 --config.data.folder=...
  byolx show-views --config=configs/image_folder.py --config.data.folder=photos

Data: one subfolder of images per class, or images without labels, or folders `train/` and `test/` of
either. Labels are used for evaluation only; without them, the evaluation draws pictures and measures
nothing. Unreadable files are logged and left out. Look at the views first (`byolx show-views`): the
encoder learns to ignore what they change.

Arguments: `size`, side of a view in pixels; `arch`, architecture of the encoder; `epochs`, where more are
better, especially for small folders; `batch`, images per step, at most the number of training images; 256
is good for thousands of images.

Cost: a training image costs as much as 8 forward passes, each 0.6 billion multiply-adds for ResNet-18 at
128 pixels. An epoch of a thousand images takes minutes on a 2-core CPU; `size=64` costs a quarter. The
run prints an estimate of its time.

Result: depends on the images, and is not in the paper. Rate, weight decay and tau are those of the
authors' preset of 100 epochs; the encoder is that of their small example.

Deviations from the paper: small batches, ResNet-18, small views, and a shorter warm-up for fewer epochs.
Below 64 pixels, the first convolution is 3x3 and there is no max pool.
"""

from ml_collections import ConfigDict


def get_config(
  size: int = 128, arch: str = "resnet18", epochs: int = 100, batch: int = 64
) -> ConfigDict:
  """Other fields have their defaults; views.view1 and views.view2 are T and T' of Table 6."""
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
