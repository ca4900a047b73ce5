"""The protocol of a task: everything in which one training protocol differs from another.

The loop (`byolx.training.step`) knows only this. A task says which variables are trained, how a model is
made, what its loss is, what moves after the optimiser's update, and what is measured.
"""

from typing import Any, Protocol, runtime_checkable

from clu import metrics
from flax import nnx
from jaxtyping import Array, Int

Batch = dict[str, Any]
"""Arrays of one batch: `view1`, ... (with `draws1`, ...) or `image` and `mask`, `label` int32 (-1: none),
`index`."""


@runtime_checkable
class Task(Protocol):
  """A frozen dataclass each."""

  @property
  def trainable(self) -> nnx.filterlib.Filter:
    """Which variables the optimiser sees."""

  def init(self, rngs: nnx.Rngs) -> nnx.Module:
    """A new model."""

  def loss(self, model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """The loss of one (micro-)batch, and scalars to log; may update the model's statistics."""

  def after_update(self, model: nnx.Module, step: Int[Array, ""]) -> dict[str, Array]:
    """Runs once per optimiser step, on the updated model, with the step before its increment.

    Returns scalars to log.
    """

  def evaluate(self, model: nnx.Module, batch: Batch) -> metrics.Collection:
    """Metrics of one evaluation batch; examples whose `mask` is False must not count."""
