"""Every field of a run: its default, its meaning, the values it takes, and where the paper has it."""

import dataclasses
import functools
from collections.abc import Mapping

from byolx.core.fields import (
  Field,
  above,
  at_least,
  between,
  each,
  fields_of,
  interval,
  one_of,
  whole,
)
from byolx.models.resnet import ResNetSpec

GROUPS: dict[str, type] = {
  "model": ResNetSpec,
}
"""The dataclass of each group."""

_view = {
  "crop_probability": Field(1.0, "share of images that are cropped", between(0, 1)),
  "crop_area": Field(
    (0.08, 1.0), "area of the crop as a share of the image's", interval(1e-4, 1, "the whole image")
  ),
  "crop_aspect": Field(
    (3 / 4, 4 / 3), "width over height, drawn on a log scale", interval(0.01, 100)
  ),
  "flip_probability": Field(0.5, "left-right flip", between(0, 1)),
  "jitter_probability": Field(
    0.8, "colour jitter, its four operations in random order", between(0, 1)
  ),
  "brightness": Field(0.4, "largest brightness change", between(0, 1)),
  "contrast": Field(0.4, "largest contrast change", between(0, 1)),
  "saturation": Field(0.2, "largest saturation change", between(0, 1)),
  "hue": Field(0.1, "largest hue shift, in turns", between(0, 0.5)),
  "grayscale_probability": Field(0.2, "colour dropping", between(0, 1)),
  "blur_probability": Field(1.0, "Gaussian blur", between(0, 1)),
  "blur_sigma": Field((0.1, 2.0), "its standard deviation, in pixels", interval(1e-3, 100)),
  "solarise_probability": Field(0.0, "solarisation", between(0, 1)),
}
_second_view = _view | {
  "blur_probability": dataclasses.replace(_view["blur_probability"], default=0.1),
  "solarise_probability": dataclasses.replace(_view["solarise_probability"], default=0.2),
}

_REST: dict[str, Field] = {
  "task": Field(
    "pretrain",
    "what is trained: pretrain, without labels; linear, classifiers on a frozen encoder; finetune, a "
    "classifier and the encoder it starts from; supervised, both from scratch",
    one_of("pretrain", "linear", "finetune", "supervised"),
  ),
  "seed": Field(0, "of everything that is drawn: parameters, order, views", between(0, 2**32 - 1)),
  # Data.
  "data.source": Field(
    "digits",
    "where images come from",
    one_of(
      "digits",
      "fashion_mnist",
      "image_folder",
      "imagenet",
      "places365",
      "cifar10",
      "cifar100",
      "array_record",
      "tfds",
    ),
  ),
  "data.folder": Field(
    "", "folder of the source, as it was unpacked or prepared; digits needs none", free=True
  ),
  "data.validation": Field(
    "none",
    "training images kept apart, to choose by: ImageNet's of appendix D.1, or of the code; or a share",
    one_of("none", "last_10009", "first_10000", "share"),
  ),
  "data.validation_share": Field(
    0.1, "of data.validation=share, the same of every class", between(0.001, 0.9)
  ),
  "data.labels": Field(
    1.0,
    "share of the training images that is used, as many of every class; a smaller share lies inside a "
    "larger one (Figure 4)",
    between(1e-6, 1),
  ),
  "data.labels_seed": Field(0, "chooses them", between(0, 2**32 - 1)),
  "data.label_list": Field(
    "", "a file with the names of the training images to use instead, such as SimCLR's 1percent.txt"
  ),
  "data.test_share": Field(
    0.2, "share held out for testing, where the source has no test set", between(0.01, 0.9)
  ),
  "data.max_failed_share": Field(
    0.01, "share of files that may fail to decode before the run stops", between(0, 1)
  ),
  "data.workers": Field(
    0,
    "processes that make views; 0: this process; -1: one per core",
    at_least(-1),
    free=True,
  ),
  "data.threads": Field(1, "threads that make views, in each of them", at_least(1), free=True),
  "data.prefetch": Field(2, "batches made ahead", at_least(1), free=True),
  # Views: appendix C, Table 6.
  "views.size": Field(224, "side of a view, pixels", at_least(4)),
  "views.crop_rule": Field(
    "one_draw",
    "one draw clamped to the image, or ten tries as torchvision",
    one_of("one_draw", "retry"),
  ),
  "views.antialias": Field(False, "antialias when a crop is made smaller"),
  "views.brightness_rule": Field(
    "additive", "x + d, or x * (1 + d) as torch ports", one_of("additive", "multiplicative")
  ),
  "views.placement": Field(
    "host", "where colours are worked: input threads or the step", one_of("host", "device")
  ),
  "views.mean": Field(
    (0.485, 0.456, 0.406), "subtracted after augmentation", each(between(0, 1), 3)
  ),
  "views.std": Field((0.229, 0.224, 0.225), "divided by after augmentation", each(above(0), 3)),
  **{f"views.view1.{name}": field for name, field in _view.items()},
  **{f"views.view2.{name}": field for name, field in _second_view.items()},
  # BYOL: appendices A and B.
  "byol.projection_size": Field(256, "size of projection and prediction", at_least(1)),
  "byol.projector_hidden": Field(4096, "hidden size of the projector", at_least(1)),
  "byol.projector_depth": Field(2, "linear layers of the projector", at_least(1)),
  "byol.predictor_hidden": Field(4096, "hidden size of the predictor", at_least(1)),
  "byol.predictor_depth": Field(2, "linear layers of the predictor", at_least(1)),
  "byol.output_bias": Field(False, "a bias in the last layer of both"),
  "byol.predictor": Field(True, "False: the projection is the prediction (Table 19)"),
  "byol.target": Field(
    "ema", "what is predicted (Table 19)", one_of("ema", "stop_gradient", "online")
  ),
  "byol.target_init": Field(
    "own_key", "target drawn apart from the online network, or a copy", one_of("own_key", "online")
  ),
  "byol.tau_base": Field(0.996, "tau at step 0", between(0, 1)),
  "byol.tau_rule": Field("cosine", "tau rises to 1, or stays", one_of("cosine", "constant")),
  "byol.average_statistics": Field(False, "the moving average takes BatchNorm's averages too"),
  "byol.directions": Field("sum", "how the two directions' losses join", one_of("sum", "mean")),
  "byol.norm_guard": Field(1e-12, "smallest squared norm in the loss; 0: none", at_least(0)),
  "byol.probe_weight": Field(
    1.0, "of the online probe's loss; 0 leaves the probe out", at_least(0)
  ),
  # Classification: appendix D.
  "classify.views": Field(
    "spatial",
    "of training: crop and flip of views.view1; all of view1 (pretrain, Table 7); or spatial and "
    "RandAugment (appendix D.2)",
    one_of("spatial", "pretrain", "randaugment"),
  ),
  "classify.tclip": Field(
    0.0, "alpha of alpha * tanh(logits / alpha) (Table 7: 20); 0: none", at_least(0)
  ),
  "classify.logit_penalty": Field(
    0.0,
    "beta, times the mean squared (clipped) logit, added to the loss (Table 7: 0.01)",
    at_least(0),
  ),
  "classify.label_smoothing": Field(
    0.0, "share of a label that is spread over all classes", between(0, 0.999)
  ),
  "classify.head_init": Field(
    "normal", "kernel of the classifier: as the encoder's, or zeros", one_of("normal", "zeros")
  ),
  "classify.randaugment.operations": Field(2, "N, one after another", whole(1)),
  "classify.randaugment.magnitude": Field(9.0, "M, in bins", at_least(0)),
  "classify.randaugment.bins": Field(31, "of magnitudes, 0 to the largest", whole(2)),
  "classify.randaugment.interpolation": Field(
    "nearest", "of shears and rotations", one_of("nearest", "bilinear")
  ),
  # Optimiser: appendix A.
  "optim.name": Field("lars", "optimiser", one_of("lars", "sgd", "adamw")),
  "optim.base_rate": Field(0.2, "peak learning rate per 256 images of a batch", above(0)),
  "optim.weight_decay": Field(1.5e-6, "of kernels", at_least(0)),
  "optim.momentum": Field(0.9, "lars, sgd", between(0, 1)),
  "optim.trust": Field(1e-3, "lars: eta of the trust ratio", above(0)),
  "optim.warmup_epochs": Field(10.0, "of linear warm-up; a cosine to 0 follows", at_least(0)),
  "optim.rates": Field(
    (),
    "linear: base rates of classifiers that are trained side by side, the best of which is chosen on "
    "the validation images; empty: optim.base_rate alone. One that diverges stops them all",
    each(above(0)),
  ),
  "optim.batch_scaling": Field(True, "base rates are per 256 images of a batch, or as they are"),
  "optim.schedule": Field(
    "cosine", "of the rate after warm-up: a cosine to 0, or none", one_of("cosine", "constant")
  ),
  "optim.exclude": Field(True, "no decay, no trust ratio for biases and normalisations"),
  # Run.
  "train.epochs": Field(1000.0, "passes over the training images", above(0)),
  "train.batch_size": Field(4096, "images per optimiser step, over all devices", at_least(1)),
  "train.micro_batch": Field(
    0, "images per forward pass, gradients averaged over passes; 0: all", at_least(0)
  ),
  "init.workdir": Field(
    "", "start with the encoder of this run's newest checkpoint, or of this checkpoint; empty: anew"
  ),
  "init.encoder": Field("online", "which of its encoders", one_of("online", "target")),
  "init.inherit": Field(
    (),
    "groups of fields that are taken from another run where this config does not set them",
    each(one_of("data", "views", "model", "eval")),
    free=True,
  ),
  "init.like": Field("", "that run's workdir; empty: init.workdir", free=True),
  "train.remat": Field(
    "none",
    "what the forward pass keeps for the backward pass, which computes the rest again: none (all), or "
    "outputs of every convolution, block, stage",
    one_of("none", "convolution", "block", "stage"),
    free=True,
  ),
  "mesh.state": Field(
    "replicated",
    "where the state lives: whole on every device; zero: optimiser, target and gradients in pieces "
    "over mesh.fsdp devices; full: parameters too",
    one_of("replicated", "zero", "full"),
    free=True,
  ),
  "mesh.data": Field(
    0, "devices over which a batch is spread; 0: all there are", at_least(0), free=True
  ),
  "mesh.fsdp": Field(
    0,
    "of them, those that share one state in pieces; 0: as many as divide them, at most 64",
    at_least(0),
    free=True,
  ),
  "compile.cache": Field(
    "../compiled",
    "folder of compiled programs, seen from the workdir: what was compiled once is not compiled "
    "again; empty: none",
    free=True,
  ),
  "mesh.cpu_devices": Field(
    0,
    "devices that a CPU is split into; 0: as many as cores and batch allow",
    at_least(0),
    free=True,
  ),
  "train.max_gradient_norm": Field(
    0.0, "a gradient norm above this counts as divergence; 0: only what is not finite", at_least(0)
  ),
  "train.on_divergence": Field(
    "stop",
    "stop, or go back to the last checkpoint and leave out the batches since",
    one_of("stop", "rollback"),
    free=True,
  ),
  "train.max_rollbacks": Field(
    3, "after so many, a divergence stops the run", at_least(0), free=True
  ),
  "checkpoint.every_epochs": Field(1.0, "between checkpoints", above(0), free=True),
  "checkpoint.every_steps": Field(0, "between checkpoints as well; 0: off", at_least(0), free=True),
  "checkpoint.every_minutes": Field(
    0.0, "between checkpoints as well; 0: off", at_least(0), free=True
  ),
  "checkpoint.keep": Field(2, "latest checkpoints kept", at_least(1), free=True),
  "checkpoint.keep_every": Field(
    0, "steps: those of every so many are kept for ever; 0: none", at_least(0), free=True
  ),
  "checkpoint.best": Field(
    "", "a metric, such as loss: the step with its best value is kept too; empty: none", free=True
  ),
  "checkpoint.best_mode": Field(
    "min", "what is best of checkpoint.best", one_of("min", "max"), free=True
  ),
  "log.every_steps": Field(50, "between rows of metrics.jsonl", at_least(1), free=True),
  "log.every_seconds": Field(10.0, "between progress lines", at_least(0), free=True),
  # Evaluation.
  "eval.test": Field(
    True, "classification: measure the test images, by what validation chose", free=True
  ),
  "eval.predictions": Field(
    False, "classification: write predictions.npz, what was said of every test image", free=True
  ),
  "eval.bootstrap": Field(
    0,
    "classification: resamples of the test images for a 95 % interval; 0: none",
    at_least(0),
    free=True,
  ),
  "eval.resize": Field(
    256, "shorter side, pixels, before the centre crop of views.size", at_least(4), free=True
  ),
  "eval.crop_rule": Field(
    "paper", "resize then crop, or crop then resize", one_of("paper", "reference"), free=True
  ),
  "eval.antialias": Field(
    False,
    "antialias when an image is made smaller, as Pillow does and the authors do not; see views.antialias",
    free=True,
  ),
  "eval.fractions": Field(
    (0.01, 0.1, 1.0), "shares of the training labels", each(between(1e-6, 1)), free=True
  ),
  "eval.draws": Field(3, "seeded draws of each share below 1", at_least(1), free=True),
  "eval.batch_size": Field(256, "images per forward pass", at_least(1), free=True),
  "eval.max_train": Field(
    0, "at most so many training images, for large sets; 0: all", at_least(0), free=True
  ),
}


def fields() -> dict[str, Field]:
  """Every field by its dotted name, in the order of `byolx fields`."""
  return dict(_assembled(tuple(GROUPS.items())))


def encoder_fields() -> dict[str, Field]:
  """The fields that go with an encoder: the function that was trained is its arrays and these.

  Initialisers (model.kernel_init, model.bn_last_scale) and model.bn_group, which is used in training mode
  only, are not among them. model.bn_decay is: with model.bn_debias the running averages are divided by
  1 - decay^updates whenever they are used.
  """
  found = {name: field for name, field in fields().items() if field.encoder or name in _ENCODER}
  return dict(sorted(found.items(), key=lambda item: item[0].partition(".")[0]))


@functools.lru_cache
def _assembled(groups: tuple[tuple[str, type], ...]) -> Mapping[str, Field]:
  found = dict(_REST)
  for group, kind in groups:
    found |= {f"{group}.{name}": field for name, field in fields_of(kind).items()}
  return found


_ENCODER = {"views.size", "views.mean", "views.std"}
