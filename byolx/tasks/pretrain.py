"""Pretraining: BYOL (Algorithm 1), and the variants of Table 19 that need no negatives."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from byolx.data.augment import on_device
from byolx.evaluation import metrics
from byolx.models.byol import BYOL, BYOLSpec, Outputs
from byolx.models.remat import VIEWS
from byolx.models.resnet import ResNetSpec
from byolx.training import losses, schedules
from byolx.training.task import Batch


@struct.dataclass
class ProbeMetrics(clu_metrics.Collection):
  """What the online probe knows of held-out images."""

  top1: clu_metrics.Average.from_output("top1")
  loss: clu_metrics.Average.from_output("loss")


@dataclasses.dataclass(frozen=True)
class Pretrain:
  """One pretraining run.

  Args:
    spec: the networks.
    steps: K, all optimiser steps.
    mean, std: colour normalisation, applied after augmentation.
    tau_base, tau_rule: of the target's moving average, see `schedules.tau`.
    average_statistics: let the moving average take BatchNorm's averages too.
    directions: "sum" of the two directions' losses (the paper), or their "mean".
    norm_guard: see `losses.regression_loss`.
    probe_weight: of the online probe's cross-entropy, whose gradient stops at the representation.
    augment_on_device: batches hold crops and draws; the colour work happens inside the step.
    brightness_rule: see `distribution.ViewSpec`, for the device's colour work.
  """

  spec: BYOLSpec
  steps: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  tau_base: float = 0.996
  tau_rule: str = "cosine"
  average_statistics: bool = False
  directions: str = "sum"
  norm_guard: float = 1e-12
  probe_weight: float = 1.0
  augment_on_device: bool = False
  brightness_rule: str = "additive"

  trainable: ClassVar[nnx.filterlib.Filter] = nnx.All(
    nnx.Param, nnx.Not(nnx.PathContains("target"))
  )

  @property
  def encoder(self) -> ResNetSpec:
    """The encoder's shape."""
    return self.spec.encoder

  def init(self, rngs: nnx.Rngs) -> BYOL:
    return BYOL(self.spec, rngs=rngs)

  def loss(
    self, model: BYOL, batch: Batch, key: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of both directions, plus the probe's; and the collapse monitors of Figure 7."""
    del key  # every random number of a view is data, see byolx.data.augment.distribution
    x = self._views(batch)
    online = model.online(x, train=True, views=2)
    prediction = _by_view(model.predict(online.projection, train=True, views=2))
    z = _by_view(self._targets(model, x, online))
    first = losses.regression_loss(prediction[:, 0], z[:, 1], self.norm_guard)
    second = losses.regression_loss(prediction[:, 1], z[:, 0], self.norm_guard)
    scale = 0.5 if self.directions == "mean" else 1.0
    byol = scale * jnp.mean(first + second)
    scalars = {"loss_byol": byol, **_monitors(online)}
    total = byol
    if model.probe is not None:
      y = jax.lax.stop_gradient(_by_view(online.representation)[:, 0])
      logits = model.probe(y)
      # Unlabelled images add nothing to the sum and are not counted.
      labelled = jnp.maximum(jnp.sum(batch["label"] >= 0), 1)
      probe = jnp.sum(losses.cross_entropy(logits, batch["label"])) / labelled
      total = total + self.probe_weight * probe
      # A batch without labels has no accuracy; NaN would pass for divergence.
      top1 = jnp.nan_to_num(metrics.topk_accuracy(logits, batch["label"], 1))
      scalars |= {"loss_probe": probe, "top1": top1}
    return total, {"loss": total, **scalars}

  def after_update(self, model: BYOL, step: Int[Array, ""]) -> dict[str, Array]:
    """The target follows the online network by tau_k, k counted before the update."""
    tau = schedules.tau(step, self.steps, self.tau_base, self.tau_rule)
    model.follow(tau, statistics=self.average_statistics)
    return {"tau": tau}

  def evaluate(self, model: BYOL, batch: Batch) -> ProbeMetrics:
    """Top-1 and cross-entropy of the online probe; labelled, unmasked images only."""
    x = on_device.network_input(batch["image"], self.mean, self.std)
    logits = model.probe(model.online.encoder(x, train=False).astype(jnp.float32))
    counted = batch["mask"] & (batch["label"] >= 0)
    correct = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    loss = losses.cross_entropy(logits, batch["label"])
    return ProbeMetrics.single_from_model_output(top1=correct, loss=loss, mask=counted)

  def _views(self, batch: Batch) -> Float[Array, "b2 s s 3"]:
    """Both views, normalised and interleaved: row 2 * b + v is view v of image b."""
    # Each view in the compute type before they are interleaved: half the bytes to move.
    views = [
      on_device.network_input(
        batch[f"view{number}"],
        self.mean,
        self.std,
        self.spec.encoder.dtype,
        batch[f"draws{number}"] if self.augment_on_device else None,
        self.brightness_rule,
      )
      for number in (1, 2)
    ]
    x = jnp.stack(views, axis=1)
    return checkpoint_name(x.reshape(-1, *x.shape[2:]), VIEWS)

  def _targets(self, model: BYOL, x: Array, online: Outputs) -> Float[Array, "b2 p"]:
    """z': what the prediction is compared with, for every row."""
    if self.spec.target == "online":
      return online.projection
    if self.spec.target == "stop_gradient":
      return jax.lax.stop_gradient(online.projection)
    # The target runs in training mode: its statistics are those of its own batch.
    return jax.lax.stop_gradient(model.target(x, train=True, views=2).projection)


def _by_view(x: Float[Array, "b2 d"]) -> Float[Array, "b 2 d"]:
  return x.reshape(-1, 2, x.shape[-1])


def _monitors(online: Outputs) -> dict[str, Array]:
  """Collapse monitors of view 1: spread and rank of the projection, norms of Figure 7."""
  y, z = (jax.lax.stop_gradient(_by_view(x)[:, 0]) for x in online)
  return {
    "std": metrics.normalised_std(z),
    "rank": metrics.participation_ratio(z),
    "norm_representation": metrics.mean_norm(y),
    "norm_projection": metrics.mean_norm(z),
  }
