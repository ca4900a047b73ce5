"""Transforms: functions from an example and its random numbers to arrays of fixed shape.

A transform declares the name, shape and dtype of its arrays. The loader allocates them for a whole
batch, in shared memory if worker processes fill them, and passes one row of each to the transform. So
views, masks, boxes and depth maps are treated alike, and all shapes are known before an image is read.
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
  """Declaration of an array.

  Attributes:
    shape: shape for one example, without the batch axis.
    dtype: numpy type of the values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype | type


Arrays = Mapping[str, Any]
"""Declared arrays by name, each an `Array` or a NamedTuple of `Array`."""

Rows = Mapping[str, Any]
"""Arrays of one example by name, which a transform fills; scalars are 0-d arrays."""


class Random(NamedTuple):
  """Random generators of one example in one epoch, which depend on seed, record and epoch only.

  Attributes:
    stream: generators of the run's seed.
    record: index of the example in its source, from 0.
    epoch: index of the epoch, from 0; 0 in evaluation.
  """

  stream: Stream
  record: int
  epoch: int

  def generator(self, number: int = 0, purpose: int = VIEW) -> np.random.Generator:
    """Returns a generator at the start of its stream; it is valid until the next call.

    Args:
      number: index of an independent stream, such as the index of a view.
      purpose: VIEW or RANDAUGMENT of `byolx.data.sampler`.
    """
    return self.stream.at(purpose, self.record, self.epoch, number)


@runtime_checkable
class Transform(Protocol):
  """Interface of transforms, which are pickled into worker processes.

  A transform fills one row of its declared arrays from one example. The loader adds `label` (int32, -1
  if unlabelled), `index` (int32, index of the record) and, in evaluation, `mask` (bool, False for
  padding), so a transform does not declare these.
  """

  @property
  def arrays(self) -> Arrays:
    """Shape and dtype of each array."""

  def __call__(self, example: Example, random: Random, rows: Rows) -> None:
    """Fills the rows, for example by `rows["image"][...] = pixels`.

    Args:
      example: image and label.
      random: random generators of the example.
      rows: uninitialised arrays of one example, by name.
    """

  def preview(self) -> "Transform":
    """Returns the transform for `views.png`, which shows its uint8 arrays [size, size, 3]."""
    return self


def empty_rows(arrays: Arrays) -> Rows:
  """Returns uninitialised arrays of one example, for a transform outside of a batch."""

  def empty(array: Any) -> Any:
    if isinstance(array, Array):
      return np.empty(array.shape, array.dtype)
    return type(array)(*map(empty, array))

  return {name: empty(array) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Views(Transform):
  """Transform to augmented views of an image, one per distribution (appendix C).

  The arrays are `view1`, `view2`, ..., uint8 [size, size, 3]. With placement "device" there are also
  `draws1`, `draws2`, ..., the random numbers (`Draws`) of the views.

  Args:
    specs: distributions of the views, at least one; two for BYOL.
    size: side of a view, pixels, at least 1.
    placement: "host" for the whole augmentation here; "device" for the crop only, with the rest in
      the train step (`on_device.apply_device`).
    antialias: True to antialias when a crop shrinks.

  Raises:
    ValueError: an argument is out of range.
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
    """True if everything after the crop is applied in the train step."""
    return self.placement == "device"

  @property
  def brightness_rule(self) -> str:
    """Brightness rule of all views, see `ViewSpec`."""
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
  """Transform to the centre crop that evaluation uses, see `resizing.evaluation_view`.

  The array is `image`, uint8 [size, size, 3].

  Args:
    size: side of the crop, pixels; 224 in the paper.
    resize: shorter side of the image before the crop, pixels, at least `size`; 256 in the paper.
    rule: "paper" or "reference", see `resizing.evaluation_view`.
    antialias: True to antialias when the image shrinks.

  Raises:
    ValueError: an argument is out of range.
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
  """Computes one view of an image, which depends on seed, record, epoch and view only.

  Args:
    image: RGB image 0..255 of any size.
    spec: distribution of the view.
    random: random generators of the example.
    view: index of the view, from 0.
    out: array for the view.
    antialias: True to antialias when the crop shrinks.
    on_host: False to apply only the crop here.

  Returns:
    Random numbers of the view, without those of RandAugment.
  """
  drawn = draw(spec, random.generator(view), *image.shape[:2])
  crop_and_resize(image, drawn.crop, len(out), antialias, out)
  if on_host:
    out[:] = apply_host(out, drawn, spec.brightness_rule)
    if spec.randaugment is not None:
      operations = randaugment.draw(spec.randaugment, random.generator(view, RANDAUGMENT))
      out[:] = randaugment.apply(out, operations, spec.randaugment.interpolation)
  return drawn
