"""Interface of tasks: the parts in which training protocols differ.

A task is a frozen dataclass that inherits from `Task`. Its attributes declared by `fields.field` are
its group of config fields. It defines the model, the loss and an action after each update for the
training loop, the transforms for the input, and the measurements, curves and records for the end of
a run. No other module depends on the name of a task. docs/adding_a_protocol.md is a complete example.
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
"""Arrays of one batch: those of the task's transform, `label` int32 [b] (-1 if unlabelled), `index`
int32 [b] (record of the image), and in evaluation `mask` bool [b] (False for padding)."""

Record = dict[str, Any]
"""One measurement of `results.json`: task, protocol, encoder, labels, split, metric, value, ..."""


class Panel(NamedTuple):
  """One plot of `curves.png`.

  Attributes:
    title: title of the plot.
    lines: at most two pairs of a scalar's name in metrics.jsonl and its name in the legend.
    scale: factor of all values, such as 100 for percentages.
    marks: horizontal lines, each a height and its label.
    from_zero: True for an axis from 0.
    top: least upper end of the axis.
    noisy: True to draw a running mean over the values.
    logarithmic: True for a logarithmic axis if the largest value exceeds 100 times the smallest.
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
    config: all fields.
    encoder: ResNet of the config group `model`; its normalisation and initialisers are also used in
      projector, predictor and probe.
    classes: number of classes of the images, 0 without labels.
    steps: K, number of optimiser steps of the run.
    network: the user's own encoder, used instead of the ResNet: a function from `nnx.Rngs` to a module
      with `features` (int), called as `module(x, train=..., views=...)`; None for the ResNet.
  """

  config: ConfigDict
  encoder: ResNetSpec
  classes: int
  steps: int
  network: Network | None = None

  @property
  def colours(self) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel, as keyword arguments of a task."""
    return {"mean": tuple(self.config.views.mean), "std": tuple(self.config.views.std)}

  @property
  def distributions(self) -> tuple[ViewSpec, ViewSpec]:
    """The distributions T and T' of the config, views.view1 and views.view2 (Table 6)."""
    views = self.config.views
    rules = {"crop_rule": views.crop_rule, "brightness_rule": views.brightness_rule}
    return ViewSpec(**views.view1, **rules), ViewSpec(**views.view2, **rules)

  def views(self, *specs: ViewSpec) -> Views:
    """Builds the transform to training views of these distributions, with the config's size."""
    views = self.config.views
    return Views(specs, views.size, views.placement, views.antialias)

  @property
  def centre(self) -> Centre:
    """The transform of evaluation images to their centre crop."""
    c = self.config
    return Centre(c.views.size, c.eval.resize, c.eval.crop_rule, c.eval.antialias)


@runtime_checkable
class Task(Protocol):
  """One training protocol: a frozen dataclass.

  Class attributes:
    group: name of the task's group of config fields.
    needs_labels: True if validation and test images must be labelled.
    selects: True if the task selects a model on the validation images and then measures it on the test
      images. If False, a run is measured on the validation images, or without them on the test images.
    own_size: True if `views.size` may differ from that of the encoder in `init.workdir`.
    parallel_rates: True if the task can train a classifier for each of several `optim.rates` at once.
    record_keys: keys in which the records of one metric and split differ; empty if there is only one.
    accuracy: name of the scalar `top1` in progress lines.
    untrained: name of the parameters without optimiser updates, in the summary.
    curves: panels of `curves.png`.
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
    """Checks combinations of fields, before any image is read.

    Raises:
      ConfigError: fields do not go together.
    """
    del config

  @classmethod
  def build(cls, setting: Setting) -> "Task":
    """Builds the task of a run.

    Raises:
      ConfigError: fields do not go together.
    """

  # Training loop.

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """Filter of the variables that the optimiser updates."""
    return nnx.Param

  @property
  def frozen(self) -> bool:
    """True if the encoder must not change, which is checked at the end of the run."""
    return False

  def init(self, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a new model, whose encoder is an attribute named `encoder`."""

  def loss(self, model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Computes the loss of one batch or micro-batch; may update the model's statistics.

    Args:
      model: the model, in training mode.
      batch: training batch.
      key: random key of this step.

    Returns:
      The loss, and the scalars to log, which include `loss`.
    """

  def after_update(self, model: nnx.Module, step: Int[Array, ""]) -> dict[str, Array]:
    """Changes the model after an optimiser step, for example its moving average.

    Args:
      model: the model, after the optimiser's update.
      step: number of the step, from 0.

    Returns:
      Scalars to log.
    """
    del model, step
    return {}

  def warning(self, scalars: Mapping[str, float]) -> str | None:
    """Returns a warning about the scalars of a step after the warm-up, or None."""
    del scalars
    return None

  # Input.

  def transform(self, split: str) -> Transform:
    """Returns the transform of the split "train" or "test"; validation images use that of "test"."""

  # Evaluation.

  def evaluate(self, model: nnx.Module, batch: Batch) -> metrics.Collection:
    """Computes the metrics of one evaluation batch, without the examples whose `mask` is False."""

  def summary(self) -> Sequence[tuple[str, str]]:
    """Returns rows of the summary before step 1, as pairs of a name and a text."""
    return ()

  def conclude(self, finished: Any) -> list[Record]:
    """Measures the trained model.

    Args:
      finished: the finished run, an `evaluation.context.Finished`.

    Returns:
      The records of `results.json`.
    """

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    """Formats records as a table for a terminal."""
    names = ("protocol", "split", "metric")
    rows = [(*names, "value")]
    rows += [
      (*(str(record[name]) for name in names), f"{record['value']:.4g}") for record in records
    ]
    return text.aligned(rows, right=(3,))
