"""Pretrains encoders by BYOL (Algorithm 1), or its variants in Table 19 without negative examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from byolx.core.fields import Field, at_least, between, field, fields_of, one_of
from byolx.data.augment import on_device
from byolx.data.transforms import Centre, Transform, Views
from byolx.evaluation import metrics
from byolx.evaluation.context import Finished
from byolx.models.byol import BYOL, BYOLSpec, Outputs
from byolx.models.remat import VIEWS
from byolx.training import losses, schedules
from byolx.training.task import Batch, Panel, Record, Setting, Task


@struct.dataclass
class ProbeMetrics(clu_metrics.Collection):
  """Top-1 accuracy, in [0, 1], and cross-entropy of the online probe.

  The online probe is a linear classifier that is trained with the encoder, without changing it.
  """

  top1: clu_metrics.Average.from_output("top1")
  loss: clu_metrics.Average.from_output("loss")


@dataclasses.dataclass(frozen=True)
class Pretrain(Task):
  """BYOL pretraining (sections 3 and 3.2, Algorithm 1).

  Args:
    spec: specification of the networks.
    steps: K, number of optimiser steps of the run.
    mean, std: mean and standard deviation of each channel, for the normalisation after augmentation.
    views: transform of a training image to two augmented views; None if the task has no input, as in
      tests.
    centre: transform of an evaluation image to its centre crop; None if the task has no input.
    tau_base: decay rate tau of the target network at step 0.
    tau_rule: name of the schedule of tau, "cosine" (up to 1) or "constant".
    average_statistics: whether the target's BatchNorm running averages are moving averages of the online
      network's, as are the target's parameters. If False, they come from the target's own forward
      passes.
    directions: reduction of the losses of the two directions, "sum" as in the paper, or "mean".
    norm_guard: lower bound of the squared norm in the loss's l2 normalisation; 0 for no bound.
    probe_weight: weight of the online probe's cross-entropy. The probe is a linear classifier on the
      representation; its gradient does not reach the encoder.
  """

  group = "byol"
  own_size = True
  record_keys = ("protocol", "encoder", "labels")
  accuracy = "online top-1"
  untrained = "target network"
  curves = (
    Panel("Loss", (("loss_byol", "BYOL"), ("loss_probe", "online probe"))),
    Panel("Online probe: top-1 (%)", (("top1", ""),), scale=100),
    Panel(
      "Projection: normalised std",
      (("std", ""),),
      marks=((1.0, "isotropic"), (metrics.STD_WARNING, "collapse")),
      top=1.0,
    ),
    Panel("Projection: participation ratio", (("rank", ""),)),
    Panel("Representation: $\\ell_2$ norm", (("norm_representation", ""),), logarithmic=True),
    Panel("Projection: $\\ell_2$ norm", (("norm_projection", ""),), logarithmic=True),
    Panel("Target decay $\\tau$", (("tau", ""),), from_zero=False, noisy=False),
    Panel("Learning rate", (("rate", ""),), noisy=False),
  )
  trainable: ClassVar[nnx.filterlib.Filter] = nnx.All(
    nnx.Param, nnx.Not(nnx.PathContains("target"))
  )

  spec: BYOLSpec
  steps: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  views: Views | None = None
  centre: Centre | None = None
  tau_base: float = field(0.996, "decay rate tau of the target network at step 0", between(0, 1))
  tau_rule: str = field(
    "cosine", "schedule of tau: a cosine up to 1, or constant", one_of("cosine", "constant")
  )
  average_statistics: bool = field(
    False, "moving average also of BatchNorm's statistics, instead of the target's own"
  )
  directions: str = field(
    "sum", "reduction of the losses of the two directions", one_of("sum", "mean")
  )
  norm_guard: float = field(
    1e-12, "smallest squared norm in the loss's l2 normalisation; 0: no bound", at_least(0)
  )
  probe_weight: float = field(
    1.0, "weight of the loss of the online linear probe; 0: no probe", at_least(0)
  )

  @classmethod
  def fields(cls) -> dict[str, Field]:
    """Returns the config fields of `BYOLSpec` (the networks), followed by those of this class."""
    return fields_of(BYOLSpec) | fields_of(cls)

  @classmethod
  def build(cls, setting: Setting) -> "Pretrain":
    """Builds the task of a run.

    The online probe is a linear classifier trained with the encoder. The task has none if the images
    have no labels or the weight of the probe is 0.
    """
    group = dict(setting.config[cls.group])
    networks = {name: group.pop(name) for name in fields_of(BYOLSpec)}
    classes = setting.classes if group["probe_weight"] else 0
    spec = BYOLSpec(setting.encoder, **networks, classes=classes, network=setting.network)
    views = setting.views(*setting.distributions)
    return cls(spec, setting.steps, **setting.colours, views=views, centre=setting.centre, **group)

  def init(self, rngs: nnx.Rngs) -> BYOL:
    return BYOL(self.spec, rngs=rngs)

  def loss(
    self, model: BYOL, batch: Batch, key: Array
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes BYOL's loss of both directions (Eq. 2) plus the weighted loss of the online probe.

    L = || q(z_1)/||q(z_1)|| - z'_2/||z'_2|| ||^2 + || q(z_2)/||q(z_2)|| - z'_1/||z'_1|| ||^2

    The online probe is a linear classifier on the representation; its gradient does not reach the
    encoder.

    Args:
      model: the networks.
      batch: training batch, with `view1`, `view2` and `label`. If views are augmented on device, also
        `draws1` and `draws2`, the random numbers of the augmentation.
      key: random key, which is not used.

    Returns:
      The loss and a dict of scalars: `loss`, `loss_byol`, and the collapse monitors `std`, `rank`,
      `norm_representation` and `norm_projection`. With a probe also `loss_probe`, and `top1`, the
      accuracy of the probe in [0, 1].
    """
    del (
      key
    )  # the random numbers of views are part of the batch, see byolx.data.augment.distribution
    x = self._both_views(batch)
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
      # The mean over labelled images: the cross-entropy of the others is 0.
      labelled = jnp.maximum(jnp.sum(batch["label"] >= 0), 1)
      probe = jnp.sum(losses.cross_entropy(logits, batch["label"])) / labelled
      total = total + self.probe_weight * probe
      # The accuracy of a batch without labels is NaN, which would count as a divergence.
      top1 = jnp.nan_to_num(metrics.topk_accuracy(logits, batch["label"], 1))
      scalars |= {"loss_probe": probe, "top1": top1}
    return total, {"loss": total, **scalars}

  def after_update(self, model: BYOL, step: Int[Array, ""]) -> dict[str, Array]:
    """Moves the target network towards the online network.

    The decay rate tau is the value of its schedule at `step`, the number of steps before this update. It
    is returned as the scalar `tau`.
    """
    tau = schedules.tau(step, self.steps, self.tau_base, self.tau_rule)
    model.follow(tau, statistics=self.average_statistics)
    return {"tau": tau}

  def warning(self, scalars: Mapping[str, float]) -> str | None:
    """Returns a warning if the projections of a batch have collapsed (are nearly equal), else None.

    Args:
      scalars: scalars of a train step, with the collapse monitors `std` and `rank`.
    """
    return metrics.collapse_warning(scalars["std"], scalars["rank"], self.spec.projection_size)

  def transform(self, split: str) -> Transform:
    return self.views if split == "train" else self.centre

  def summary(self) -> list[tuple[str, str]]:
    return [("target", f"{self.spec.target}, tau from {self.tau_base:g} ({self.tau_rule})")]

  def conclude(self, finished: Finished) -> list[Record]:
    """Measures the trained encoders, an untrained one and raw pixels by k-NN and linear probes.

    Returns:
      The records of results.json.
    """
    from byolx.evaluation import encoders  # scikit-learn and matplotlib take seconds to import

    return encoders.compare(self, finished)

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    from byolx.evaluation import probes

    return probes.format_table(records)

  def evaluate(self, model: BYOL, batch: Batch) -> ProbeMetrics:
    """Computes the metrics of the online probe (a linear classifier) on the labelled, unmasked images."""
    x = on_device.network_input(batch["image"], self.mean, self.std)
    logits = model.probe(model.online.encoder(x, train=False).astype(jnp.float32))
    counted = batch["mask"] & (batch["label"] >= 0)
    correct = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    loss = losses.cross_entropy(logits, batch["label"])
    return ProbeMetrics.single_from_model_output(top1=correct, loss=loss, mask=counted)

  def _both_views(self, batch: Batch) -> Float[Array, "b2 s s 3"]:
    """Normalises both views of each image and interleaves them: row 2 * b + v is view v of image b."""
    # Views are cast to the compute type before they are interleaved: bfloat16 has half the bytes.
    views = [
      on_device.network_input(
        batch[f"view{number}"],
        self.mean,
        self.std,
        self.spec.encoder.dtype,
        *self._augmentation(batch, number),
      )
      for number in (1, 2)
    ]
    x = jnp.stack(views, axis=1)
    return checkpoint_name(x.reshape(-1, *x.shape[2:]), VIEWS)

  def _augmentation(self, batch: Batch, number: int) -> tuple:
    """Returns the random numbers and the brightness rule for a view that is augmented on device.

    The tuple is empty if the views are augmented on the host.

    Args:
      batch: training batch.
      number: number of the view, 1 or 2.
    """
    if self.views is None or not self.views.on_device:
      return ()
    return batch[f"draws{number}"], self.views.brightness_rule

  def _targets(self, model: BYOL, x: Array, online: Outputs) -> Float[Array, "b2 p"]:
    """Computes the target projections z', one per row of x.

    Args:
      model: the networks.
      x: normalised views of all images.
      online: outputs of the online network for x. Variants without a target network use its projections.
    """
    if self.spec.target == "online":
      return online.projection
    if self.spec.target == "stop_gradient":
      return jax.lax.stop_gradient(online.projection)
    # In training mode: the target normalises by the statistics of its own batch.
    return jax.lax.stop_gradient(model.target(x, train=True, views=2).projection)


def _by_view(x: Float[Array, "b2 d"]) -> Float[Array, "b 2 d"]:
  return x.reshape(-1, 2, x.shape[-1])


def _monitors(online: Outputs) -> dict[str, Array]:
  """Computes the collapse monitors of view 1, from the outputs of the online network (Figure 7).

  They are the spread `std` and the rank `rank` of the projections z, and the mean norms of the
  representations y and of z.
  """
  y, z = (jax.lax.stop_gradient(_by_view(x)[:, 0]) for x in online)
  return {
    "std": metrics.normalised_std(z),
    "rank": metrics.participation_ratio(z),
    "norm_representation": metrics.mean_norm(y),
    "norm_projection": metrics.mean_norm(z),
  }
