"""Context of an evaluation: a finished run."""

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
  """Finished run: the inputs of the task's evaluation of the model.

  With several processes, each process has its own instance.

  Args:
    config: all fields.
    model: the trained model.
    untrained: function that returns a new model as it was at step 0.
    mesh: devices of the run.
    train: training images.
    validation: validation images; None without them.
    test: test images; None if the run does not measure them.
    labels: share of the training labels that was used, in (0, 1].
    batches: function from a source to this process's rows of its evaluation batches.
    normalise: function from uint8 images to the encoder's input.
    workdir: folder of the run.
    lineage: facts about the checkpoint of a pretrained encoder; None for an encoder from scratch.
    facts: keys that all records of the run share: task, seed, step, config (fingerprint), commit.
    writer: True in the process that writes files.
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
    """Name and images of the split that measures a run without model selection."""
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test

  @property
  def devices(self) -> str:
    """Number and kind of devices, such as `2 x cpu`."""
    return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
