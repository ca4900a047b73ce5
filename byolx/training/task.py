"""The task contract: everything in which one training protocol differs from another.

A protocol is a frozen dataclass that inherits from `Task`. Its attributes made by `fields.field` are its
group of the config. The loop takes from it a model, a loss and what follows an update; the input takes
its transforms; the end of a run takes measurements, curves and records. Nothing else depends on its
name. docs/adding_a_protocol.md is an example in full.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from clu import metrics
from flax import nnx
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from byolx.core import text
from byolx.core.fields import Field, fields_of
from byolx.data.augment.distribution import ViewSpec
from byolx.data.transforms import Centre, Transform, Views
from byolx.models.resnet import ResNetSpec

Batch = dict[str, Any]
"""Arrays of one batch: those of the task's transform, `label` int32 [b] (-1: unlabelled), `index` int32
[b], and in evaluation `mask` bool [b]."""

Record = dict[str, Any]
"""One measurement of `results.json`: task, protocol, encoder, labels, split, metric, value, ..."""


class Panel(NamedTuple):
  """One pair of axes of `curves.png`.

  Attributes:
    title: heading.
    lines: pairs of a scalar's name in metrics.jsonl and its name in the legend, at most two.
    scale: factor of all values, such as 100 for percentages.
    marks: horizontal lines, each a height and its meaning.
    from_zero: whether the axis begins at 0.
    top: smallest upper end of the axis.
    noisy: whether a running mean is drawn over the values.
    logarithmic: whether the axis is logarithmic where values spread over a factor of 100.
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
  """The facts of a run from which its task is built.

  Args:
    config: all fields.
    encoder: the ResNet of the config's group `model`; its normalisation and initialisers are those of
      the heads too.
    classes: number of classes of the images, 0 without labels.
    steps: K, all optimiser steps.
    network: the user's own encoder instead of the ResNet: a function from `nnx.Rngs` to a module with
      `features` (int), called as `module(x, train=..., views=...)`; None without one.
  """

  config: ConfigDict
  encoder: ResNetSpec
  classes: int
  steps: int
  network: Callable[[nnx.Rngs], nnx.Module] | None = None

  @property
  def colours(self) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of the colour normalisation, as arguments of a task."""
    return {"mean": tuple(self.config.views.mean), "std": tuple(self.config.views.std)}

  @property
  def distributions(self) -> tuple[ViewSpec, ViewSpec]:
    """T and T' of the config: views.view1 and views.view2 (Table 6)."""
    views = self.config.views
    rules = {"crop_rule": views.crop_rule, "brightness_rule": views.brightness_rule}
    return ViewSpec(**views.view1, **rules), ViewSpec(**views.view2, **rules)

  def views(self, *specs: ViewSpec) -> Views:
    """The training views of these distributions, at the config's size and placement."""
    views = self.config.views
    return Views(specs, views.size, views.placement, views.antialias)

  @property
  def centre(self) -> Centre:
    """The evaluation view of the config."""
    c = self.config
    return Centre(c.views.size, c.eval.resize, c.eval.crop_rule, c.eval.antialias)


@runtime_checkable
class Task(Protocol):
  """One training protocol: a frozen dataclass.

  Class attributes:
    group: name of the group of config fields; the dataclass fields with metadata are its fields.
    needs_labels: whether validation and test images must be labelled.
    selects: whether validation images choose, and test images are measured afterwards; otherwise a run
      is measured on the validation images, or on the test images where there are none.
    own_size: whether `views.size` may differ from that of the encoder in `init.workdir`.
    parallel_rates: whether several `optim.rates` are trained side by side.
    record_keys: keys by which the records of one metric and split differ; empty where there is one.
    accuracy: name of the scalar `top1` in progress lines.
    untrained: name of the parameters that the optimiser leaves alone, for the table of the state.
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

  # From the config.

  @classmethod
  def fields(cls) -> dict[str, Field]:
    """The fields of the task's group, by name."""
    return fields_of(cls)

  @classmethod
  def check(cls, config: ConfigDict) -> None:
    """Refuses combinations of fields that cannot run, before any image is read.

    Raises:
      ConfigError: fields that do not go together.
    """
    del config

  @classmethod
  def build(cls, setting: Setting) -> "Task":
    """The task of a run.

    Raises:
      ConfigError: fields that do not go together.
    """

  # For the loop.

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """Filter of the variables that the optimiser trains."""
    return nnx.Param

  @property
  def frozen(self) -> bool:
    """Whether the encoder must keep every bit; this is checked at the end of the run."""
    return False

  def init(self, rngs: nnx.Rngs) -> nnx.Module:
    """A new model. An encoder in it is an attribute called `encoder`."""

  def loss(self, model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """The loss of one (micro-)batch, and scalars to log, `loss` among them.

    It may update the model's statistics.
    """

  def after_update(self, model: nnx.Module, step: Int[Array, ""]) -> dict[str, Array]:
    """Changes the updated model once per optimiser step, such as a moving average.

    Args:
      model: the model, after the optimiser's update.
      step: number of the step, from 0.

    Returns:
      Scalars to log.
    """
    del model, step
    return {}

  def warning(self, scalars: Mapping[str, float]) -> str | None:
    """A warning about one row of scalars after the warm-up, such as a collapse; None without one."""
    del scalars
    return None

  # For the input.

  def transform(self, split: str) -> Transform:
    """The transform of the "train" or the "test" split; validation images take that of "test"."""

  # For the end.

  def evaluate(self, model: nnx.Module, batch: Batch) -> metrics.Collection:
    """Metrics of one evaluation batch; examples whose `mask` is False must not count."""

  def summary(self) -> Sequence[tuple[str, str]]:
    """Rows for the summary before step 1, pairs of a name and its text."""
    return ()

  def conclude(self, finished: Any) -> list[Record]:
    """Measures the trained model.

    Args:
      finished: an `evaluation.context.Finished`: config, model, mesh, images by split, batches, ...

    Returns:
      Records of `results.json`.
    """

  @classmethod
  def table(cls, records: Sequence[Record]) -> str:
    """Records as a table for a terminal."""
    names = ("protocol", "split", "metric")
    rows = [(*names, "value")]
    rows += [
      (*(str(record[name]) for name in names), f"{record['value']:.4g}") for record in records
    ]
    return text.aligned(rows, right=(3,))
