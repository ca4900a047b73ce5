"""The finished run that an evaluation receives: its model, images and settings."""

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
  """A finished run: everything that a task needs to evaluate the trained model.

  With several processes, each process has its own instance.

  Args:
    config: config of the run, with all fields.
    model: the trained model.
    untrained: function that returns a new model with the parameters of step 0.
    mesh: devices of the run.
    train: training images.
    validation: validation images; None if the run has none.
    test: test images; None if the run does not measure them.
    labels: share of the training labels that was used, in (0, 1].
    batches: function from images to their evaluation batches. It returns the rows of each batch that
      belong to this process.
    normalise: function from uint8 images to the encoder's input.
    workdir: folder of the run.
    lineage: facts about the checkpoint from which the encoder was loaded; None if the encoder was not
      loaded.
    facts: values that all records of the run (entries of `results.json`) share: task, seed, step, config
      (fingerprint), commit.
    writer: whether this process writes the files of the run.
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
    """Name and images of the split on which pretrained encoders are evaluated.

    This is the validation split. If the run has no validation images, it is the test split.
    """
    if self.validation is not None:
      return "validation", self.validation
    return "test", self.test

  @property
  def devices(self) -> str:
    """Number and kind of the run's devices, such as `2 x cpu`."""
    return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
