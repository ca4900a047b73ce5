"""Classification: linear evaluation, its variation, fine-tuning, supervised baselines (appendix D)."""

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
  """Mean over the images that count, for each head."""

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
  """What the heads know of held-out images."""

  top1: HeadMean.from_output("top1")
  top5: HeadMean.from_output("top5")
  loss: HeadMean.from_output("loss")


@dataclasses.dataclass(frozen=True)
class Classify(Task):
  """Classifiers on an encoder; `Linear`, `FineTune` and `Supervised` are its protocols.

  Several heads have one loss each, and no gradient of one reaches another: they are trained as in
  runs of their own, but the encoder runs once.

  Args:
    spec: the network.
    mean, std: colour normalisation of each channel, applied after augmentation.
    train_views: the training view.
    centre: the evaluation view.
    base_rates: base learning rate of each head, in the order of the heads; for the summary.
    origin: workdir of the encoder; empty from scratch.
    views: name of the training views.
    tclip: alpha of `losses.tclip`; 0: none.
    logit_penalty: beta, weight of `losses.logit_penalty`.
    label_smoothing: share of a label that is spread over all classes.
    head_init: name of the initialiser of the heads' kernels.
    randaugment: settings of RandAugment, for `views` "randaugment".
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
    "training views: crop and flip of views.view1; all of view1 (pretrain, Table 7); or spatial and "
    "RandAugment (appendix D.2)",
    one_of("spatial", "pretrain", "randaugment"),
  )
  tclip: float = field(
    0.0, "alpha of alpha * tanh(logits / alpha) (Table 7: 20); 0: none", at_least(0)
  )
  logit_penalty: float = field(
    0.0,
    "beta, weight of the mean squared (clipped) logit in the loss (Table 7: 0.01)",
    at_least(0),
  )
  label_smoothing: float = field(
    0.0, "share of a label that is spread over all classes", between(0, 0.999)
  )
  head_init: str = field(
    "normal", "kernel of the classifier: as the encoder's, or zeros", one_of("normal", "zeros")
  )
  randaugment: RandAugment = _RANDAUGMENT

  @classmethod
  def check(cls, config: ConfigDict) -> None:
    """Refuses an origin that does not fit the protocol, and a run that would measure nothing."""
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
        "eval.test=False with data.validation=none: nothing would be measured; expected one of them"
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
        f"optim.rates={rates} with optim.name={c.optim.name}: its steps are not "
        "proportional to the rate of one classifier alone; expected optim.name=sgd"
      )
    if len(rates) > 1 and c.data.validation == "none":
      raise ConfigError(
        f"optim.rates={rates} with data.validation=none: expected validation images "
        "to choose by, or one rate"
      )
    try:
      group["randaugment"] = RandAugment(**group["randaugment"])
    except ValueError as error:
      raise ConfigError(f"classify.randaugment: {error}") from None
    if group["views"] == "randaugment" and c.views.placement == "device":
      raise ConfigError(
        "classify.views=randaugment with views.placement=device: RandAugment is work of the host; "
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
    """The sum of the heads' losses.

    Of each: mean of cross_entropy(tclip(x), y) + beta * average(tclip(x)^2) over labelled images.
    """
    del key  # every random number of a view is data, see byolx.data.augment.distribution
    colour_work = ()
    if self.train_views is not None and self.train_views.on_device:
      colour_work = batch["draws1"], self.train_views.brightness_rule
    dtype = self.spec.encoder.dtype
    x = on_device.network_input(batch["view1"], self.mean, self.std, dtype, *colour_work)
    logits = losses.tclip(model(x, train=True, frozen=self.frozen), self.tclip)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    each = losses.cross_entropy(logits, labels, self.label_smoothing)
    if self.logit_penalty:
      each = each + self.logit_penalty * jnp.where(labels >= 0, losses.logit_penalty(logits), 0.0)
    counted = jnp.maximum(jnp.sum(batch["label"] >= 0), 1)
    of_head = jnp.sum(each, axis=0) / counted
    correct = (jnp.argmax(logits, axis=-1) == labels) & (labels >= 0)
    top1 = jnp.sum(correct, axis=0) / counted
    scalars = {"loss": jnp.mean(of_head), "top1": jnp.max(top1)}
    if self.spec.heads > 1:
      scalars |= {f"loss_{number}": of_head[number] for number in range(self.spec.heads)}
    return jnp.sum(of_head), scalars

  def evaluate(self, model: Classifier, batch: Batch) -> ClassifierMetrics:
    """Top-1, top-5 and cross-entropy of every head; labelled, unmasked images only."""
    found = self.predict(model, batch)
    counted = batch["mask"] & (batch["label"] >= 0)
    return ClassifierMetrics.single_from_model_output(
      **{f"top{k}": (found["rank"] < k).astype(jnp.float32) for k in (1, 5)},
      loss=found["loss"],
      mask=counted,
    )

  def predict(self, model: Classifier, batch: Batch) -> dict[str, Array]:
    """What every head says of every image.

    Returns:
      rank: int32 [b, n], how many classes come before the label's.
      loss: float32 [b, n], cross-entropy.
      classes: int32 [b, n, k], the most probable ones, at most five, best first.
      probabilities: float32 [b, n, k].
    """
    x = on_device.network_input(batch["image"], self.mean, self.std, self.spec.encoder.dtype)
    logits = losses.tclip(model(x, train=False), self.tclip)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    most, classes = jax.lax.top_k(jax.nn.softmax(logits), min(5, self.spec.classes))
    return {
      "rank": metrics.rank_of_label(logits, labels),
      "loss": losses.cross_entropy(logits, labels),
      "classes": classes,
      "probabilities": most,
    }

  def transform(self, split: str) -> Transform:
    return self.train_views if split == "train" else self.centre

  def summary(self) -> list[tuple[str, str]]:
    origin = f"that of {self.origin}" if self.origin else "from scratch"
    rates = ", ".join(f"{rate:g}" for rate in self.base_rates)
    heads = [("heads", f"{self.spec.heads} side by side, base rates {rates}")]
    return [
      ("training", f"{'the classifier alone' if self.frozen else 'everything'}; encoder {origin}"),
      *(heads if self.spec.heads > 1 else []),
      (
        "loss",
        f"cross-entropy, tclip {self.tclip:g}, logit penalty {self.logit_penalty:g}, "
        f"label smoothing {self.label_smoothing:g}; {self.views} views",
      ),
    ]

  def conclude(self, finished: Finished) -> list[Record]:
    """Accuracy of the head that the validation images choose, on the test images."""
    from byolx.evaluation import classifiers

    return classifiers.choose_and_test(self, finished)

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    from byolx.evaluation import classifiers

    return classifiers.format_table(records)


class Linear(Classify):
  """Linear evaluation: classifiers on a frozen encoder (appendix D.1)."""

  parallel_rates = True

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """The heads."""
    return nnx.All(nnx.Param, nnx.PathContains("heads"))

  @property
  def frozen(self) -> bool:
    """The encoder's parameters and statistics keep every bit."""
    return True


class FineTune(Classify):
  """Fine-tuning: a classifier and the encoder that it starts from (appendix D.1)."""


class Supervised(Classify):
  """Supervised baseline: a classifier and an encoder from scratch (appendix D.2)."""

  from_scratch = True


def _distribution(setting: Setting, views: str, chosen: RandAugment) -> ViewSpec:
  """The distribution of the training view, by the field `classify.views`."""
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
  return dataclasses.replace(spatial, randaugment=chosen) if views == "randaugment" else spatial
