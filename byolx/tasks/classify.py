"""Classification: linear evaluation, its variation, fine-tuning, supervised baselines (appendix D)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from byolx.data.augment import on_device
from byolx.evaluation import metrics
from byolx.models.classifier import Classifier, ClassifierSpec
from byolx.models.resnet import ResNetSpec
from byolx.training import losses
from byolx.training.task import Batch


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
class Classify:
  """One run that trains classifiers.

  Several heads have one loss each, and no gradient of one reaches another: they are trained as in
  runs of their own, but the encoder runs once.

  Args:
    spec: the network.
    frozen: the encoder's parameters and statistics stay as they are.
    mean, std: colour normalisation, applied after augmentation.
    alpha: of tclip; 0: none.
    beta: of the logit penalty.
    smoothing: of labels.
    augment_on_device: batches hold crops and draws; the colour work happens inside the step.
    brightness_rule: see `distribution.ViewSpec`, for the device's colour work.
  """

  spec: ClassifierSpec
  frozen: bool
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  alpha: float = 0.0
  beta: float = 0.0
  smoothing: float = 0.0
  augment_on_device: bool = False
  brightness_rule: str = "additive"

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """The heads, and the encoder unless it is frozen."""
    return nnx.All(nnx.Param, nnx.PathContains("heads")) if self.frozen else nnx.Param

  @property
  def encoder(self) -> ResNetSpec:
    """The encoder's shape."""
    return self.spec.encoder

  def init(self, rngs: nnx.Rngs) -> Classifier:
    return Classifier(self.spec, rngs=rngs)

  def loss(
    self, model: Classifier, batch: Batch, key: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The sum of the heads' losses.

    Of each: mean of cross_entropy(tclip(x), y) + beta * average(tclip(x)^2) over labelled images.
    """
    del key  # every random number of a view is data, see byolx.data.augment.distribution
    draws = batch["draws1"] if self.augment_on_device else None
    x = on_device.network_input(
      batch["view1"], self.mean, self.std, self.encoder.dtype, draws, self.brightness_rule
    )
    logits = losses.tclip(model(x, train=True, frozen=self.frozen), self.alpha)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    each = losses.cross_entropy(logits, labels, self.smoothing)
    if self.beta:
      each = each + self.beta * jnp.where(labels >= 0, losses.logit_penalty(logits), 0.0)
    counted = jnp.maximum(jnp.sum(batch["label"] >= 0), 1)
    of_head = jnp.sum(each, axis=0) / counted
    correct = (jnp.argmax(logits, axis=-1) == labels) & (labels >= 0)
    top1 = jnp.sum(correct, axis=0) / counted
    scalars = {"loss": jnp.mean(of_head), "top1": jnp.max(top1)}
    if self.spec.heads > 1:
      scalars |= {f"loss_{number}": of_head[number] for number in range(self.spec.heads)}
    return jnp.sum(of_head), scalars

  def after_update(self, model: Classifier, step: Int[Array, ""]) -> dict[str, Array]:
    """Nothing moves but what is trained."""
    del model, step
    return {}

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
    x = on_device.network_input(batch["image"], self.mean, self.std, self.encoder.dtype)
    logits = losses.tclip(model(x, train=False), self.alpha)
    labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
    most, classes = jax.lax.top_k(jax.nn.softmax(logits), min(5, self.spec.classes))
    return {
      "rank": metrics.rank_of_label(logits, labels),
      "loss": losses.cross_entropy(logits, labels),
      "classes": classes,
      "probabilities": most,
    }
