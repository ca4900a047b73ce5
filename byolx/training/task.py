"""Interface of tasks. A task defines all that differs between training protocols, such as the loss.

A task is a frozen dataclass that inherits from `Task`. The attributes that it declares by
`fields.field` are its group of config fields. A task defines the model, the loss, and an action after
each update. It also defines the transforms of images. For the end of a run, it defines the
measurements, the curves, and the records for `results.json`. No other module depends on the name of
a task. docs/adding_a_protocol.md is a complete example.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from clu import metrics
from flax import nnx
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from byolx.core import text
from byolx.core.fields import Field, fields_of
from byolx.data.augment.distribution import ViewSpec
from byolx.data.transforms import Centre, Transform, Views
from byolx.models.encoder import Network
from byolx.models.resnet import ResNetSpec

Batch = dict[str, Any]
"""Arrays of one batch, by name: the arrays that the task's transform makes; `label` int32 [b], -1
if unlabelled; `index` int32 [b], the number of the image's record; and in evaluation `mask` bool
[b], False for rows that only fill up the batch."""

Record = dict[str, Any]
"""One measurement in `results.json`: a dictionary with the keys task, protocol, encoder, labels,
split, metric, value and others."""


class Panel(NamedTuple):
  """One plot of `curves.png`.

  Attributes:
    title: title of the plot.
    lines: one or two curves, each a pair: the name of a scalar in metrics.jsonl, and the curve's
      name in the legend.
    scale: factor of all values, such as 100 for percentages.
    marks: horizontal lines, each a pair of height and label.
    from_zero: whether the vertical axis starts at 0 if no value is negative.
    top: value that an axis from 0 must include, even if all values are smaller.
    noisy: whether a running mean is drawn over the values.
    logarithmic: whether the vertical axis may be logarithmic. It is so if all values are positive
      and the largest is more than 100 times the smallest.
  """

  title: str
  lines: tuple[tuple[str, str], ...]
  scale: float = 1.0
  marks: tuple[tuple[float, str], ...] = ()
  from_zero: bool = True
  top: float = -math.inf
  noisy: bool = True
  logarithmic: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
  """Facts about a run from which its task is built.

  Args:
    config: config of the run, with all fields.
    encoder: config group `model`, the specification of the ResNet. The projector and the predictor
      use its normalisation and its initialiser too. The probe, a linear classifier, uses its
      initialiser.
    classes: number of classes of the images; 0 if they have no labels.
    steps: number K of optimiser steps of the run.
    network: function that makes the user's own encoder, which replaces the ResNet. It takes
      `nnx.Rngs` and returns a module with `features` (int) that is called as `module(x, train=...,
      views=...)`. None to use the ResNet.
  """

  config: ConfigDict
  encoder: ResNetSpec
  classes: int
  steps: int
  network: Network | None = None

  @property
  def colours(self) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each colour channel, as keyword arguments of a task."""
    return {"mean": tuple(self.config.views.mean), "std": tuple(self.config.views.std)}

  @property
  def distributions(self) -> tuple[ViewSpec, ViewSpec]:
    """Distributions T and T' of random views, from the fields views.view1 and views.view2 (Table 6)."""
    views = self.config.views
    rules = {"crop_rule": views.crop_rule, "brightness_rule": views.brightness_rule}
    return ViewSpec(**views.view1, **rules), ViewSpec(**views.view2, **rules)

  def views(self, *specs: ViewSpec) -> Views:
    """Returns the transform that makes random views of a training image, one per entry of `specs`."""
    views = self.config.views
    return Views(specs, views.size, views.placement, views.antialias)

  @property
  def centre(self) -> Centre:
    """Transform of evaluation images to their centre crop, with the size and rules of the config."""
    c = self.config
    return Centre(c.views.size, c.eval.resize, c.eval.crop_rule, c.eval.antialias)


@runtime_checkable
class Task(Protocol):
  """One training protocol: a frozen dataclass.

  Class attributes:
    group: name of the task's group of config fields.
    needs_labels: whether validation and test images must have labels.
    selects: whether the task selects a model on the validation images and then measures this model
      on the test images. If False, no model is selected, and the trained model is measured on the
      validation images. If there are no validation images, it is measured on the test images.
    own_size: whether `views.size` may differ from the size that the encoder in `init.workdir` was
      trained with.
    parallel_rates: whether the task can train several classifiers at once, one for each of several
      `optim.rates`.
    record_keys: keys in which two records of `results.json` differ if they have the same metric and
      split; empty if there are no two such records.
    accuracy: name that progress lines show for the scalar `top1`.
    untrained: name that the summary shows for the parameters that the optimiser does not update.
    curves: plots of `curves.png`.
  """

  group: ClassVar[str]
  needs_labels: ClassVar[bool] = False
  selects: ClassVar[bool] = False
  own_size: ClassVar[bool] = False
  parallel_rates: ClassVar[bool] = False
  record_keys: ClassVar[Sequence[str]] = ()
  accuracy: ClassVar[str] = "top-1"
  untrained: ClassVar[str] = "frozen parameters"
  curves: ClassVar[Sequence[Panel]] = (
    Panel("Loss", (("loss", ""),)),
    Panel("Learning rate", (("rate", ""),), noisy=False),
  )

  # Config.

  @classmethod
  def fields(cls) -> dict[str, Field]:
    """Returns the fields of the task's config group by name."""
    return fields_of(cls)

  @classmethod
  def check(cls, config: ConfigDict) -> None:
    """Checks, before any image is read, that the values of the config's fields are possible together.

    Raises:
      ConfigError: the values of two or more fields are impossible together.
    """
    del config

  @classmethod
  def build(cls, setting: Setting) -> "Task":
    """Builds the task of a run from facts about the run.

    Raises:
      ConfigError: the values of two or more config fields are impossible together.
    """

  # Training loop.

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """Filter that selects the variables that the optimiser updates."""
    return nnx.Param

  @property
  def frozen(self) -> bool:
    """Whether the encoder must stay unchanged; this is checked at the end of the run."""
    return False

  def init(self, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a new model, in which each encoder is an attribute named `encoder`."""

  def loss(self, model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Computes the loss of one batch or micro-batch; the call may update the model's batch statistics.

    Args:
      model: the model, which the task calls in training mode.
      batch: training batch.
      key: random key for this batch or micro-batch.

    Returns:
      The loss, and the scalars to log by name, which include `loss`.
    """

  def after_update(self, model: nnx.Module, step: Int[Array, ""]) -> dict[str, Array]:
    """Changes the model after an optimiser step; for example, BYOL moves the target network.

    Args:
      model: the model, after the optimiser's update.
      step: number of optimiser steps done before this one, 0 for the first.

    Returns:
      Scalars to log, by name.
    """
    del model, step
    return {}

  def warning(self, scalars: Mapping[str, float]) -> str | None:
    """Checks the scalars of one logged step, and returns a warning to print if they look wrong.

    For example, BYOL warns of collapsed projections. The method is called only after the warm-up of
    the learning rate. After it has returned a warning, it is not called again.

    Args:
      scalars: scalars of the step, by name.

    Returns:
      Text of the warning; None if there is nothing to warn of.
    """
    del scalars
    return None

  # Input.

  def transform(self, split: str) -> Transform:
    """Returns the transform that turns images of a split into the arrays of a batch.

    Args:
      split: name of the split, "train" or "test"; validation images use the transform of "test".
    """

  # Evaluation.

  def evaluate(self, model: nnx.Module, batch: Batch) -> metrics.Collection:
    """Computes the metrics of one evaluation batch; examples whose `mask` is False are left out."""

  def summary(self) -> Sequence[tuple[str, str]]:
    """Returns the task's rows in the summary printed before step 1, as pairs of name and text."""
    return ()

  def conclude(self, finished: Any) -> list[Record]:
    """Measures the trained model at the end of a run.

    Args:
      finished: the finished run, an `evaluation.context.Finished`.

    Returns:
      The records to write into `results.json`.
    """

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    """Formats the records of `results.json` as a table for a terminal."""
    names = ("protocol", "split", "metric")
    rows = [(*names, "value")]
    rows += [
      (*(str(record[name]) for name in names), f"{record['value']:.4g}") for record in records
    ]
    return text.aligned(rows, right=(3,))
