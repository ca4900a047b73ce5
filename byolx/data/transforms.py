"""Transforms: functions that turn an example into arrays of fixed shape, such as its augmented views.

A transform declares the name, shape and dtype of its arrays. The loader allocates these arrays for many
examples at once, in shared memory where possible. The transform then fills one row of each array for an
example. So views, masks, boxes and depth maps are treated alike. All shapes are known before an image is
read.
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
  """Shape and dtype of one array that a transform fills.

  Attributes:
    shape: shape for one example, without the batch axis.
    dtype: numpy type of the values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype | type


Arrays = Mapping[str, Any]
"""Declared shapes and dtypes by name of the array; each is an `Array` or a NamedTuple of `Array`s."""

Rows = Mapping[str, Any]
"""Arrays of one example by name, to be filled by a transform; for a scalar, a 0-d array."""


class Random(NamedTuple):
  """Source of the random numbers of one example in one epoch.

  The numbers depend only on the seed of `stream`, the record and the epoch.

  Attributes:
    stream: random generator with the seed of the run, or with a fixed seed in evaluation.
    record: index of the example in its source, from 0.
    epoch: index of the epoch, from 0; 0 in evaluation.
  """

  stream: Stream
  record: int
  epoch: int

  def generator(self, number: int = 0, purpose: int = VIEW) -> np.random.Generator:
    """Returns a generator of random numbers for the example. Use it only until the next call.

    Args:
      number: index of an independent stream of random numbers, such as the index of a view.
      purpose: purpose of the numbers, VIEW or RANDAUGMENT of `byolx.data.sampler`.
    """
    return self.stream.at(purpose, self.record, self.epoch, number)


@runtime_checkable
class Transform(Protocol):
  """Interface of transforms: objects that fill arrays from one example.

  A transform is pickled into worker processes. It does not declare the following arrays, because the
  loader adds them itself: `label` (int32, -1 if unlabelled), `index` (int32, index of the record) and,
  in evaluation, `mask` (bool, False for padding and unreadable records).
  """

  @property
  def arrays(self) -> Arrays:
    """Shape and dtype of each array that the transform fills, by name."""

  def __call__(self, example: Example, random: Random, rows: Rows) -> None:
    """Fills the arrays of one example, for example by `rows["image"][...] = pixels`.

    Args:
      example: image and label.
      random: source of the example's random numbers.
      rows: uninitialised arrays of one example, by name.
    """

  def preview(self) -> "Transform":
    """Returns a variant of this transform, with all augmentation on the host.

    It is used to draw the picture `views.png`.
    """
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
  """Transform that makes augmented views of an image, one for each distribution (appendix C).

  It fills the arrays `view1`, `view2`, ..., uint8 [size, size, 3]. With placement "device" it also fills
  `draws1`, `draws2`, ..., the random numbers (`Draws`) with which the train step augments the views.

  Args:
    specs: distributions from which the augmentations are drawn, one per view; two for BYOL.
    size: side of a view, pixels, at least 1.
    placement: place of the augmentation: "host" to do all of it here; "device" to only crop and resize
      here, and leave the rest to the train step (`on_device.apply_device`).
    antialias: whether to antialias where a crop shrinks.

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
    """Whether the train step, rather than the loader, applies all augmentation that follows the crop."""
    return self.placement == "device"

  @property
  def brightness_rule(self) -> str:
    """Brightness rule of the first view, "additive" or "multiplicative"; a config has one for all."""
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
  """Transform that resizes an image and crops its centre, for evaluation (appendix C).

  It fills the array `image`, uint8 [size, size, 3].

  Args:
    size: side of the crop, pixels; 224 in the paper.
    resize: shorter side of the image before the crop, pixels, at least `size`; 256 in the paper.
    rule: name of the rule: "paper" resizes the image, then crops it; "reference", as in the authors'
      code, crops first and then resizes the crop.
    antialias: whether to antialias where the image shrinks.

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
  """Makes one randomly augmented view of an image, and writes it to `out`.

  Args:
    image: RGB image 0..255 of any size.
    spec: distribution from which the augmentation is drawn.
    random: source of the example's random numbers.
    view: index of the view, from 0.
    out: array for the view.
    antialias: whether to antialias where the crop shrinks.
    on_host: whether to apply the whole augmentation. If False, the image is only cropped and resized.

  Returns:
    Random numbers of the view, except those of RandAugment.
  """
  drawn = draw(spec, random.generator(view), *image.shape[:2])
  crop_and_resize(image, drawn.crop, len(out), antialias, out)
  if on_host:
    out[:] = apply_host(out, drawn, spec.brightness_rule)
    if spec.randaugment is not None:
      operations = randaugment.draw(spec.randaugment, random.generator(view, RANDAUGMENT))
      out[:] = randaugment.apply(out, operations, spec.randaugment.interpolation)
  return drawn
