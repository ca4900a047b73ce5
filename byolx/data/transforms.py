"""Transforms: from one example and its random numbers to arrays of fixed shape.

A transform declares the name, shape and dtype of every array that it makes. The input allocates them
for a whole batch, in shared memory where worker processes fill them, and passes one row of each to the
transform. So views, masks, boxes or depth maps take the same way, and shapes are known before any
image is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from byolx.data.augment import randaugment
from byolx.data.augment.distribution import Draws, ViewSpec, draw
from byolx.data.augment.on_host import apply_host
from byolx.data.augment.resizing import crop_and_resize, evaluation_view
from byolx.data.sampler import RANDAUGMENT, VIEW, Stream
from byolx.data.sources.base import Example

PLACEMENTS = ("host", "device")


class Array(NamedTuple):
  """Shape and dtype of one array of one example, without the batch axis."""

  shape: tuple[int, ...]
  dtype: np.dtype | type


Arrays = Mapping[str, Any]
"""Names to `Array`, or to a NamedTuple of `Array`; a batch has the same names."""

Rows = Mapping[str, Any]
"""Names to numpy arrays that a transform fills, one example's row of each; scalars are 0-d arrays."""


class Random(NamedTuple):
  """The random numbers of one example in one epoch: a function of seed, epoch and record only.

  Attributes:
    stream: generators of the run's seed.
    record: number of the example in its source, from 0.
    epoch: number of the pass over the source, from 0; 0 in evaluation.
  """

  stream: Stream
  record: int
  epoch: int

  def generator(self, number: int = 0, purpose: int = VIEW) -> np.random.Generator:
    """A generator at its start. It is valid until the next call: finish one before the next.

    Args:
      number: number of the generator, such as that of a view; different numbers share nothing.
      purpose: VIEW or RANDAUGMENT of `byolx.data.sampler`.
    """
    return self.stream.at(purpose, self.record, self.epoch, number)


@runtime_checkable
class Transform(Protocol):
  """One example in, one row of every declared array out. It is pickled into worker processes.

  Every batch also has `label` (int32, -1 without one) and `index` (int32, number of the record), and
  in evaluation `mask` (bool, False for padding); a transform does not declare these.
  """

  @property
  def arrays(self) -> Arrays:
    """Shape and dtype of every array."""

  def __call__(self, example: Example, random: Random, rows: Rows) -> None:
    """Fills the rows: `rows["image"][...] = pixels`. They hold anything before."""

  def preview(self) -> "Transform":
    """The transform that `views.png` shows: its arrays [size, size, 3] uint8 are the pictures."""
    return self


@dataclasses.dataclass(frozen=True)
class Views(Transform):
  """Augmented views `view1`, `view2`, ... of an image, one per distribution (appendix C).

  Arrays: `viewN` uint8 [size, size, 3]; with placement "device" also `drawsN`, the `Draws` of view N.

  Args:
    specs: distributions of the views, at least one; BYOL has two.
    size: side of a view, pixels.
    placement: "host" applies the whole augmentation; "device" only crops, and leaves the rest to
      `on_device.apply_device` inside the train step.
    antialias: whether a crop that shrinks is antialiased.

  Raises:
    ValueError: an argument outside its range.
  """

  specs: tuple[ViewSpec, ...]
  size: int
  placement: str = "host"
  antialias: bool = False

  def __post_init__(self):
    if self.placement not in PLACEMENTS:
      raise ValueError(f"placement is {self.placement!r}; expected one of {', '.join(PLACEMENTS)}")
    if not self.specs:
      raise ValueError("no view was given; expected at least one ViewSpec")
    if self.size < 1:
      raise ValueError(f"size is {self.size}; expected at least 1")

  @property
  def on_device(self) -> bool:
    """Whether the train step does the colour work."""
    return self.placement == "device"

  @property
  def brightness_rule(self) -> str:
    """The brightness rule of all views, see `ViewSpec`."""
    return self.specs[0].brightness_rule

  @property
  def arrays(self) -> Arrays:
    numbers = range(1, len(self.specs) + 1)
    arrays: dict[str, Any] = {
      f"view{number}": Array((self.size, self.size, 3), np.uint8) for number in numbers
    }
    if self.on_device:
      values = draw(ViewSpec(), np.random.default_rng(0), self.size, self.size)
      drawn = Draws(*(Array(np.shape(value), np.asarray(value).dtype) for value in values))
      arrays |= {f"draws{number}": drawn for number in numbers}
    return arrays

  def __call__(self, example: Example, random: Random, rows: Rows) -> None:
    for view, spec in enumerate(self.specs):
      drawn = make_view(
        example.image,
        spec,
        random,
        view,
        rows[f"view{view + 1}"],
        self.antialias,
        not self.on_device,
      )
      if self.on_device:
        for row, value in zip(rows[f"draws{view + 1}"], drawn, strict=True):
          row[...] = value

  def preview(self) -> "Views":
    return dataclasses.replace(self, placement="host")


@dataclasses.dataclass(frozen=True)
class Centre(Transform):
  """The one view of an image that evaluation uses, see `resizing.evaluation_view`.

  Array: `image` uint8 [size, size, 3].

  Args:
    size: side of the view, pixels; 224 in the paper.
    resize: shorter side before the crop, pixels, at least `size`; 256 in the paper.
    rule: "paper" or "reference", see `resizing.evaluation_view`.
    antialias: whether an image that shrinks is antialiased.

  Raises:
    ValueError: an argument outside its range.
  """

  size: int
  resize: int
  rule: str = "paper"
  antialias: bool = False

  def __post_init__(self):
    self._view(np.zeros((1, 1, 3), np.uint8))

  @property
  def arrays(self) -> Arrays:
    return {"image": Array((self.size, self.size, 3), np.uint8)}

  def __call__(self, example: Example, random: Random, rows: Rows) -> None:
    del random
    rows["image"][...] = self._view(example.image)

  def _view(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
    return evaluation_view(image, self.size, self.resize, self.rule, self.antialias)


def make_view(
  image: UInt8[np.ndarray, "h w 3"],
  spec: ViewSpec,
  random: Random,
  view: int,
  out: UInt8[np.ndarray, "size size 3"],
  antialias: bool,
  on_host: bool = True,
) -> Draws:
  """Makes one view of an image, a function of seed, record, epoch and number of the view.

  Args:
    image: RGB pixels 0..255, any size.
    spec: distribution of the view.
    random: random numbers of the example.
    view: number of the view, from 0.
    out: array that receives the view.
    antialias: whether a crop that shrinks is antialiased.
    on_host: False leaves everything after the crop to the train step.

  Returns:
    The view's random numbers, without those of RandAugment.
  """
  drawn = draw(spec, random.generator(view), *image.shape[:2])
  crop_and_resize(image, drawn.crop, len(out), antialias, out)
  if on_host:
    out[:] = apply_host(out, drawn, spec.brightness_rule)
    if spec.randaugment is not None:
      chosen = randaugment.draw(spec.randaugment, random.generator(view, RANDAUGMENT))
      out[:] = randaugment.apply(out, chosen, spec.randaugment.interpolation)
  return drawn
