"""Trains classifiers: linear evaluation, fine-tuning and supervised baselines (appendix D)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from byolx.core.config import ConfigError
from byolx.core.fields import at_least, between, field, one_of
from byolx.data.augment import on_device
from byolx.data.augment.distribution import ViewSpec
from byolx.data.augment.randaugment import RandAugment
from byolx.data.transforms import Centre, Transform, Views
from byolx.evaluation import metrics
from byolx.evaluation.context import Finished
from byolx.models.classifier import Classifier, ClassifierSpec
from byolx.training import losses
from byolx.training.task import Batch, Panel, Record, Setting, Task

_RANDAUGMENT = RandAugment()


@struct.dataclass
class HeadMean(clu_metrics.Metric):
  """Metric that averages a value over the unmasked images, with one mean per head (classifier)."""

  total: Float[Array, "n"]
  count: Int[Array, ""]

  @classmethod
  def from_model_output(
    cls, values: Float[Array, "b n"], mask: Bool[Array, "b"], **_: Any
  ) -> "HeadMean":
    total = jnp.sum(jnp.where(mask[:, None], values, 0.0), axis=0)
    return cls(total, jnp.sum(mask, dtype=jnp.int32))

  def merge(self, other: "HeadMean") -> "HeadMean":
    return type(self)(self.total + other.total, self.count + other.count)

  def compute(self) -> Float[Array, "n"]:
    return self.total / self.count


@struct.dataclass
class ClassifierMetrics(clu_metrics.Collection):
  """Top-1 and top-5 accuracy, in [0, 1], and cross-entropy of each head (linear classifier)."""

  top1: HeadMean.from_output("top1")
  top5: HeadMean.from_output("top5")
  loss: HeadMean.from_output("loss")


@dataclasses.dataclass(frozen=True)
class Classify(Task):
  """Trains classifiers on an encoder: the base class of `Linear`, `FineTune` and `Supervised`.

  A head is one linear classifier. A model has several heads to train several learning rates at once.
  Each head has its own loss, and no gradient of one head reaches another. On a frozen encoder the
  heads are therefore trained as in separate runs, but the encoder is evaluated only once.

  Args:
    spec: specification of the network.
    mean, std: mean and standard deviation of each channel, for the normalisation after augmentation.
    train_views: transform of a training image to its augmented view; None if the task has no input, as
      in tests.
    centre: transform of an evaluation image to its centre crop; None if the task has no input.
    base_rates: base learning rate of each head, for the summary; empty if there is one head with
      optim.base_rate.
    origin: workdir of the run that pretrained the encoder; empty for an encoder from scratch.
    views: name of the augmentation of training images: "spatial" (crop and flip), "pretrain" (that of
      the pretraining) or "randaugment" (crop, flip and RandAugment).
    tclip: bound alpha of the clipped logits alpha * tanh(logits / alpha); 0 for no clipping.
    logit_penalty: weight beta of the mean squared logit in the loss.
    label_smoothing: share of a label that is spread over all classes, 0 to 0.999.
    head_init: name of the initialiser of the heads' kernels, "normal" or "zeros".
    randaugment: settings of RandAugment, used if `views` is "randaugment".
  """

  group = "classify"
  needs_labels = True
  selects = True
  curves = (
    Panel("Loss", (("loss", ""),)),
    Panel("Training images: top-1 (%)", (("top1", ""),), scale=100),
    Panel("Gradient: $\\ell_2$ norm", (("norm_gradient", ""),), logarithmic=True),
    Panel("Learning rate", (("rate", ""),), noisy=False),
  )
  from_scratch: ClassVar[bool] = False

  spec: ClassifierSpec
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  train_views: Views | None = None
  centre: Centre | None = None
  base_rates: tuple[float, ...] = ()
  origin: str = ""
  views: str = field(
    "spatial",
    "training view: spatial, crop and flip of views.view1; pretrain, all of views.view1 (Table 7); "
    "randaugment, crop, flip and RandAugment (appendix D.2)",
    one_of("spatial", "pretrain", "randaugment"),
  )
  tclip: float = field(
    0.0,
    "bound alpha of clipped logits, alpha * tanh(logits / alpha) (Table 7: 20); 0: no clipping",
    at_least(0),
  )
  logit_penalty: float = field(
    0.0,
    "weight beta of the mean squared (clipped) logit in the loss (Table 7: 0.01)",
    at_least(0),
  )
  label_smoothing: float = field(
    0.0, "share of a label that is spread over all classes", between(0, 0.999)
  )
  head_init: str = field(
    "normal",
    "initial kernel of the classifier: normal, by the encoder's initialiser; or zeros",
    one_of("normal", "zeros"),
  )
  randaugment: RandAugment = _RANDAUGMENT

  @classmethod
  def check(cls, config: ConfigDict) -> None:
    """Checks init.workdir, and that the run has images for the evaluation.

    init.workdir must be set if the task needs a pretrained encoder, and must not be set otherwise.

    Raises:
      ConfigError: init.workdir is missing, or is set but would not be used; or the run measures neither
        validation images nor test images.
    """
    task, workdir = config.task, config.init.workdir
    if not (cls.from_scratch or workdir):
      raise ConfigError(
        f"task={task} without init.workdir: expected the workdir or checkpoint whose encoder is "
        "evaluated (task=supervised starts from scratch)"
      )
    if cls.from_scratch and workdir:
      raise ConfigError(
        f"task={task} with init.workdir={workdir}: it starts from scratch; expected task=finetune, or "
        "init.like to take only fields from that run"
      )
    if config.data.validation == "none" and not config.eval.test:
      raise ConfigError(
        "eval.test=False with data.validation=none: nothing would be measured; expected "
        "eval.test=True, or validation images"
      )

  @classmethod
  def build(cls, setting: Setting) -> "Classify":
    c, group = setting.config, dict(setting.config[cls.group])
    rates = tuple(c.optim.rates)
    if setting.classes < 2:
      raise ConfigError(
        f"task={c.task}: the images of data.source={c.data.source} have {setting.classes} classes; "
        "expected labels of at least two"
      )
    if len(rates) > 1 and c.optim.name != "sgd":
      raise ConfigError(
        f"optim.rates={rates} with optim.name={c.optim.name}: the update of a classifier is not "
        "proportional to its rate; expected optim.name=sgd"
      )
    if len(rates) > 1 and c.data.validation == "none":
      raise ConfigError(
        f"optim.rates={rates} with data.validation=none: expected validation images "
        "to select the rate, or one rate"
      )
    try:
      group["randaugment"] = RandAugment(**group["randaugment"])
    except ValueError as error:
      raise ConfigError(f"classify.randaugment: {error}") from None
    if group["views"] == "randaugment" and c.views.placement == "device":
      raise ConfigError(
        "classify.views=randaugment with views.placement=device: RandAugment runs on the host only; "
        "expected views.placement=host"
      )
    zeros = group["head_init"] == "zeros"
    head_init = nnx.initializers.zeros_init() if zeros else setting.encoder.initializer
    heads = max(1, len(rates))
    return cls(
      ClassifierSpec(setting.encoder, setting.classes, heads, head_init, setting.network),
      **setting.colours,
      train_views=setting.views(_distribution(setting, group["views"], group["randaugment"])),
      centre=setting.centre,
      base_rates=rates,
      origin=c.init.workdir,
      **group,
    )

  def init(self, rngs: nnx.Rngs) -> Classifier:
    return Classifier(self.spec, rngs=rngs)

  def loss(
    self, model: Classifier, batch: Batch, key: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes the sum of the losses of all heads (linear classifiers).

    The loss of a head (appendix D.1), for the logits x_b and the class y_b of each labelled image b, is

    mean over b of  cross_entropy(tclip(x_b), y_b) + beta * mean over k of tclip(x_b)_k^2

    Args:
      model: the classifier.
      batch: training batch, with `view1` and `label`. If views are augmented on device, also `draws1`,
        the random numbers of the augmentation.
      key: random key, which is not used.

    Returns:
      The loss and a dict of scalars. `loss` is the mean of the heads' losses, and `top1` is the
      accuracy of the best head, in [0, 1]. With several heads, `loss_N` is the loss of head N, from 0.
    """
    del (
      key
    )  # the random numbers of views are part of the batch, see byolx.data.augment.distribution
    augmentation = ()
    if self.train_views is not None and self.train_views.on_device:
      augmentation = batch["draws1"], self.train_views.brightness_rule
    dtype = self.spec.encoder.dtype
    x = on_device.network_input(batch["view1"], self.mean, self.std, dtype, *augmentation)
    logits = losses.tclip(model(x, train=True, frozen=self.frozen), self.tclip)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    loss = losses.cross_entropy(logits, labels, self.label_smoothing)
    if self.logit_penalty:
      loss = loss + self.logit_penalty * jnp.where(labels >= 0, losses.logit_penalty(logits), 0.0)
    counted = jnp.maximum(jnp.sum(batch["label"] >= 0), 1)
    head_losses = jnp.sum(loss, axis=0) / counted
    correct = (jnp.argmax(logits, axis=-1) == labels) & (labels >= 0)
    top1 = jnp.sum(correct, axis=0) / counted
    scalars = {"loss": jnp.mean(head_losses), "top1": jnp.max(top1)}
    if self.spec.heads > 1:
      scalars |= {f"loss_{number}": head_losses[number] for number in range(self.spec.heads)}
    return jnp.sum(head_losses), scalars

  def evaluate(self, model: Classifier, batch: Batch) -> ClassifierMetrics:
    """Computes the metrics of each head (linear classifier) on the labelled, unmasked images."""
    outputs = self.predict(model, batch)
    counted = batch["mask"] & (batch["label"] >= 0)
    return ClassifierMetrics.single_from_model_output(
      **{f"top{k}": (outputs["rank"] < k).astype(jnp.float32) for k in (1, 5)},
      loss=outputs["loss"],
      mask=counted,
    )

  def predict(self, model: Classifier, batch: Batch) -> dict[str, Array]:
    """Predicts the classes of the images in a batch, by each of the n heads (linear classifiers).

    Returns:
      rank: rank of the label by decreasing logit, 0 for the largest, int32 [b, n].
      loss: cross-entropy, float32 [b, n].
      classes: the k = min(5, classes) most probable classes, best first, int32 [b, n, k].
      probabilities: softmax probabilities of these classes, float32 [b, n, k].
    """
    x = on_device.network_input(batch["image"], self.mean, self.std, self.spec.encoder.dtype)
    logits = losses.tclip(model(x, train=False), self.tclip)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), min(5, self.spec.classes))
    return {
      "rank": metrics.rank_of_label(logits, labels),
      "loss": losses.cross_entropy(logits, labels),
      "classes": classes,
      "probabilities": probabilities,
    }

  def transform(self, split: str) -> Transform:
    return self.train_views if split == "train" else self.centre

  def summary(self) -> list[tuple[str, str]]:
    origin = f"of {self.origin}" if self.origin else "from scratch"
    rates = ", ".join(f"{rate:g}" for rate in self.base_rates)
    heads = [("heads", f"{self.spec.heads} in parallel, base rates {rates}")]
    return [
      (
        "training",
        f"{'classifier only' if self.frozen else 'classifier and encoder'}; encoder {origin}",
      ),
      *(heads if self.spec.heads > 1 else []),
      (
        "loss",
        f"cross-entropy, tclip {self.tclip:g}, logit penalty {self.logit_penalty:g}, "
        f"label smoothing {self.label_smoothing:g}; {self.views} views",
      ),
    ]

  def conclude(self, finished: Finished) -> list[Record]:
    """Selects the best head (linear classifier) on validation images, and measures it on test images.

    Returns:
      The records of results.json.
    """
    from byolx.evaluation import classifiers

    return classifiers.choose_and_test(self, finished)

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    from byolx.evaluation import classifiers

    return classifiers.format_table(records)


class Linear(Classify):
  """Linear evaluation: trains classifiers on a frozen encoder (appendix D.1)."""

  parallel_rates = True

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """Filter that selects the parameters of the heads (linear classifiers). Only these are trained."""
    return nnx.All(nnx.Param, nnx.PathContains("heads"))

  @property
  def frozen(self) -> bool:
    """Always True: the encoder's parameters and statistics must not change."""
    return True


class FineTune(Classify):
  """Fine-tuning: trains a classifier and a pretrained encoder together (appendix D.1)."""


class Supervised(Classify):
  """Supervised baseline: trains a classifier and an encoder from scratch (appendix D.2)."""

  from_scratch = True


def _distribution(setting: Setting, views: str, augment: RandAugment) -> ViewSpec:
  """Returns the random augmentation of the training images.

  Args:
    setting: facts about the run, with the augmentations of the config.
    views: name of the augmentation, the value of the field `classify.views`: "pretrain" for all
      augmentations of views.view1, "spatial" for its crop and flip, or "randaugment" for crop, flip and
      RandAugment.
    augment: settings of RandAugment, used if `views` is "randaugment".
  """
  first, _ = setting.distributions
  if views == "pretrain":
    return first
  spatial = dataclasses.replace(
    first,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
    solarise_probability=0.0,
  )
  return dataclasses.replace(spatial, randaugment=augment) if views == "randaugment" else spatial
