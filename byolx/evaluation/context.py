"""A run at its end, as its task sees it."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from byolx.data.sources.base import Source
from byolx.training.task import Batch


@dataclasses.dataclass(frozen=True)
class Finished:
  """A run at its end: everything that its task needs to measure the model.

  With several processes, every process has one: `batches` are its own rows, and `writer` says whether
  it writes files.

  Args:
    config: all fields.
    model: the trained model.
    untrained: function that makes the model as it was before step 1.
    mesh: devices of the run.
    train: images of the training.
    validation: images for choosing; None without.
    test: images for the test; None where the run must not look at them.
    labels: share of the training labels that was used, in (0, 1].
    batches: function from a source to its evaluation batches, by the task's transform.
    normalise: function from uint8 images to the encoder's input.
    workdir: folder of the run.
    lineage: facts about the checkpoint that the encoder came from; None without one.
    facts: keys that all records of the run have: task, seed, step, config (fingerprint), commit.
    writer: whether this process writes files.
  """

  config: ConfigDict
  model: nnx.Module
  untrained: Callable[[], nnx.Module]
  mesh: Mesh
  train: Source
  validation: Source | None
  test: Source | None
  labels: float
  batches: Callable[[Source], Iterator[Batch]]
  normalise: Callable[[Array], Array]
  workdir: Path
  lineage: dict[str, Any] | None
  facts: dict[str, Any]
  writer: bool

  @property
  def held_out(self) -> tuple[str, Source]:
    """Name and images of the split on which a run that chooses nothing is measured."""
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test

  @property
  def devices(self) -> str:
    """Number and kind of the devices, such as `2 x cpu`."""
    return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
